// Package catalog is the names of a cluster as plain values: package kube reads
// them from the API server, package dns answers from them, and neither knows
// the other.
package catalog

import "net/netip"

// A Service with what stands behind it. No address is of IPv4 written as one of IPv6.
type Service struct {
	Namespace, Name string

	// ClusterIPs are the virtual addresses, primary family first; none for a
	// headless Service or an ExternalName.
	ClusterIPs []netip.Addr

	// Headless is clusterIP: None.
	Headless bool

	// ExternalName is the target of a Service of that type, else "".
	ExternalName string

	Ports []Port

	// Endpoints are the addresses to publish: the ready ones, and the others
	// too where the Service says publishNotReadyAddresses.
	Endpoints []Endpoint
}

// Port of a Service or of an endpoint. Name may be "". Protocol is in lower
// case: "tcp", "udp", "sctp".
type Port struct {
	Name     string
	Protocol string
	Port     uint16
}

// An Endpoint is one address behind a Service. Hostname is the name it has
// below the Service (StatefulSet pods, pods with hostname and subdomain), else "".
type Endpoint struct {
	Addr     netip.Addr
	Hostname string
	Ports    []Port
}

// A Scope tells of which namespaces a catalog holds everything.
type Scope struct {
	All        bool     // every namespace of the cluster
	Namespaces []string // where not All: these
}

// A Sink takes a catalog as it is read and as it changes. Its methods are
// called from one goroutine at a time and return soon. The values are the
// sink's to keep and nobody's to change.
type Sink interface {
	PutService(Service)
	DropService(namespace, name string)

	// SetNamespaces gives the names of all namespaces that exist, as far as
	// they can be known.
	SetNamespaces([]string)

	// SetScope tells what is held whole from now on. The zero Scope, which is
	// where a sink begins, holds nothing: what is not found is then unknown,
	// not absent.
	SetScope(Scope)
}
