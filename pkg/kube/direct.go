package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Endpoints that are no host.
const (
	Auto         = "auto"         // a NodePort, at the addresses of the shadow's own node
	LoadBalancer = "loadbalancer" // what the cloud makes for a Service of that type
	HostPort     = "hostport"     // a port of the shadow's node, without a Service
)

// published is the Service that leads past the API server, as it was last seen.
type published struct {
	mu      sync.Mutex
	root    metav1.OwnerReference // of the session as it was last made
	of      types.UID             // the root that the Service hangs from
	service *corev1.Service
	at      time.Time // when it was made, if it was now
}

// Endpoints are where a shadow is reached past the API server: at any of these.
type Endpoints struct {
	TCP, UDP []netip.AddrPort

	// New tells that not every node may know yet what leads there: kube-proxy writes
	// its rules once a second.
	New bool
}

// Endpoints finds them, and makes what leads there where that is asked for. avoid
// tells which addresses would lead round in a circle.
func (s *Shadow) Endpoints(ctx context.Context, avoid func(netip.Addr) bool) (all Endpoints, err error) {
	p, err := s.place(ctx)
	if err != nil {
		return all, err
	}
	for _, host := range p.hosts {
		addrs, err := lookup(ctx, host)
		if err != nil {
			return all, err
		}
		for _, a := range slices.DeleteFunc(addrs, avoid) {
			if p.tcp > 0 {
				all.TCP = append(all.TCP, netip.AddrPortFrom(a, p.tcp))
			}
			if p.udp > 0 {
				all.UDP = append(all.UDP, netip.AddrPortFrom(a, p.udp))
			}
		}
	}
	if len(all.TCP)+len(all.UDP) == 0 {
		return all, fmt.Errorf("the shadow has no address outside of the cluster's ranges, of %s", p.hosts)
	}
	all.New = s.published.isNew()
	return all, nil
}

// DialDirect connects to the shadow's pod at one of at, the first that answers, and
// tells which. ctx bounds the dial only.
func (s *Shadow) DialDirect(ctx context.Context, at Endpoints) (net.Conn, netip.AddrPort, error) {
	for {
		conn, to, err := s.dialEndpoints(ctx, at.TCP)
		if err == nil || !at.New || !errors.Is(err, syscall.ECONNREFUSED) {
			s.Reached(at, err == nil)
			return conn, to, err
		}
		if pause(ctx, 200*time.Millisecond) != nil {
			return nil, to, err
		}
	}
}

// Reached tells whether an endpoint led to the shadow: what leads there may have been
// taken away by somebody else, and is then looked for again.
func (s *Shadow) Reached(at Endpoints, yes bool) {
	if !yes && !at.New {
		s.published.forget()
	}
}

func (s *Shadow) dialEndpoints(ctx context.Context, at []netip.AddrPort) (net.Conn, netip.AddrPort, error) {
	if len(at) == 0 {
		return nil, netip.AddrPort{}, errors.New("no TCP leads to the shadow")
	}
	var errs []error
	for i, address := range at {
		conn, err := s.dialAt(ctx, address, len(at)-i)
		if err == nil {
			return conn, address, nil
		}
		errs = append(errs, err)
	}
	return nil, netip.AddrPort{}, errors.Join(errs...)
}

// dialAt has a fair share of what time is left for so many addresses.
func (s *Shadow) dialAt(ctx context.Context, address netip.AddrPort, addresses int) (net.Conn, error) {
	ctx, cancel := share(ctx, addresses)
	defer cancel()
	raw, err := s.cluster.conns.dialApart(ctx, "tcp", address.String())
	if err != nil {
		return nil, err
	}
	to := door{address.Addr().String(), int(address.Port()), s.cfg.Path.Upgrade}
	conn := newConn(Way("endpoint"), to, raw, raw, raw.Close)
	defer context.AfterFunc(ctx, func() { conn.fail(ctx.Err()) })()
	if err := conn.upgrade(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	return conn, nil
}

// share is a part of the time that ctx has left.
func share(ctx context.Context, parts int) (context.Context, context.CancelFunc) {
	end, bounded := ctx.Deadline()
	if !bounded {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Until(end)/time.Duration(parts))
}

// place is where the shadow's port is, by one or several names or addresses.
type place struct {
	hosts    []string
	tcp, udp uint16
}

func (s *Shadow) place(ctx context.Context) (place, error) {
	to := s.cfg.Path.Endpoint
	if host, text, err := net.SplitHostPort(to); err == nil {
		port, err := strconv.ParseUint(text, 10, 16)
		return place{[]string{host}, uint16(port), uint16(port)}, err
	}
	if to == HostPort {
		return s.atHostPort(ctx)
	}
	service, err := s.publish(ctx)
	if err != nil {
		return place{}, fmt.Errorf("publish the shadow: %w", sorted(err))
	}
	if to == LoadBalancer {
		return s.atBalancer(ctx, service)
	}
	p := place{hosts: []string{to}}
	for _, at := range service.Spec.Ports {
		if at.NodePort == 0 {
			return p, fmt.Errorf("service %s got no ports of the nodes", service.Name)
		}
		p.open(at.Protocol, at.NodePort)
	}
	if to == Auto {
		return s.atNode(ctx, p)
	}
	return p, nil
}

// open notes a port.
func (p *place) open(protocol corev1.Protocol, port int32) {
	if protocol == corev1.ProtocolUDP {
		p.udp = uint16(port)
	} else {
		p.tcp = uint16(port)
	}
}

// atHostPort is where the pod's port is at its node.
func (s *Shadow) atHostPort(ctx context.Context) (p place, err error) {
	pod, err := s.readyPod(ctx)
	if err != nil {
		return p, err
	}
	for _, c := range pod.Spec.Containers {
		for _, at := range c.Ports {
			if at.ContainerPort == port && at.HostPort > 0 {
				p.open(at.Protocol, at.HostPort)
			}
		}
	}
	if p.tcp == 0 {
		return p, fmt.Errorf("pod %s was made without a port of its node's", pod.Name)
	}
	p.hosts = s.nodeAddrs(ctx, pod)
	return p, nil
}

// atNode is a place at the addresses of the pod's node.
func (s *Shadow) atNode(ctx context.Context, p place) (place, error) {
	pod, err := s.readyPod(ctx)
	if err == nil {
		p.hosts = s.nodeAddrs(ctx, pod)
	}
	return p, err
}

// atBalancer is that of the load balancer, which whoever makes it may take a minute to
// tell.
func (s *Shadow) atBalancer(ctx context.Context, service *corev1.Service) (p place, err error) {
	if len(service.Status.LoadBalancer.Ingress) == 0 {
		if service, err = s.publishedNow(ctx, service.Name); err != nil {
			s.published.forget()
			return p, err
		}
	}
	for _, at := range service.Spec.Ports {
		p.open(at.Protocol, at.Port)
	}
	for _, in := range service.Status.LoadBalancer.Ingress {
		p.hosts = append(p.hosts, cmp.Or(in.IP, in.Hostname))
	}
	if len(p.hosts) == 0 {
		return p, fmt.Errorf("the load balancer of service %s has no address yet", service.Name)
	}
	return p, nil
}

// hostPort is one of the node's, below those that Kubernetes and kernels give away
// themselves. Sessions that meet at one are scheduled to different nodes.
func hostPort(session string) uint16 {
	h := fnv.New32a()
	h.Write([]byte(session))
	return uint16(20000 + h.Sum32()%10000)
}

// openHostPort makes the shadow's port one of its node's.
func openHostPort(session string, pod *corev1.PodSpec) {
	ports := &pod.Containers[0].Ports
	for _, protocol := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
		i := slices.IndexFunc(*ports, func(p corev1.ContainerPort) bool { return p.Protocol == protocol && p.ContainerPort == port })
		if i < 0 {
			i = len(*ports)
			*ports = append(*ports, corev1.ContainerPort{ContainerPort: port, Protocol: protocol})
		}
		(*ports)[i].HostPort = int32(hostPort(session))
	}
}

// nodeAddrs are those of the pod's node, its external ones first where the user may
// see them: Kubernetes tells the internal ones with the pod.
func (s *Shadow) nodeAddrs(ctx context.Context, pod *corev1.Pod) (all []string) {
	add := func(text string) {
		if text != "" && !slices.Contains(all, text) {
			all = append(all, text)
		}
	}
	ask, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	only := metav1.ListOptions{FieldSelector: "metadata.name=" + pod.Spec.NodeName} // culvert's own rights have no get
	if nodes, err := s.cluster.client.CoreV1().Nodes().List(ask, only); err == nil {
		for _, node := range nodes.Items {
			for _, a := range node.Status.Addresses {
				if a.Type == corev1.NodeExternalIP {
					add(a.Address)
				}
			}
		}
	}
	for _, ip := range pod.Status.HostIPs {
		add(ip.IP)
	}
	add(pod.Status.HostIP)
	return all
}

// made notes the root of a session that was just made.
func (p *published) made(root metav1.OwnerReference) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.root = root
}

// isNew tells whether the Service was made a moment ago.
func (p *published) isNew() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Since(p.at) < 5*time.Second
}

// forget has the Service asked for, or made, again.
func (p *published) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.of = ""
}

// publish makes the Service, unless the present root has it.
func (s *Shadow) publish(ctx context.Context) (*corev1.Service, error) {
	p := &s.published
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.root.UID == "" {
		return nil, fmt.Errorf("%w: session %s is not there", ErrGone, s.cfg.Session)
	}
	if p.of == p.root.UID {
		return p.service, nil
	}
	service := &corev1.Service{}
	if err := decode("direct.yaml", wordsOf(s.cfg, s.cluster.Namespace, s.holder), service); err != nil {
		return nil, err
	}
	if s.cfg.Path.Endpoint == LoadBalancer {
		service.Spec.Type = corev1.ServiceTypeLoadBalancer
		only := s.cfg.Path.Only
		service.Spec.Ports = slices.DeleteFunc(service.Spec.Ports, func(p corev1.ServicePort) bool {
			return only != "" && !strings.EqualFold(only, string(cmp.Or(p.Protocol, corev1.ProtocolTCP)))
		})
	}
	if s.pod != "" { // others stand in beside it
		service.Spec.Selector[labelPod] = labelValue(s.pod)
	}
	service.SetOwnerReferences([]metav1.OwnerReference{p.root})
	made, err := makeOne(ctx, "service", s.cluster.client.CoreV1().Services(s.cluster.Namespace).Create, service)
	isNew := err == nil
	if apierrors.IsAlreadyExists(err) { // what was asked before had no answer
		made, err = s.publishedNow(ctx, service.Name)
	}
	if err != nil {
		return nil, err
	}
	if owners := made.GetOwnerReferences(); made.DeletionTimestamp != nil || len(owners) != 1 || owners[0].UID != p.root.UID {
		return nil, fmt.Errorf("service %s is still that of the shadow before", made.Name)
	}
	if made.Spec.Type != service.Spec.Type {
		return nil, fmt.Errorf("service %s is a %s of somebody who shares the router, not a %s", made.Name, made.Spec.Type, service.Spec.Type)
	}
	p.of, p.service = p.root.UID, made
	if isNew {
		p.at = time.Now()
	}
	return made, nil
}

func (s *Shadow) publishedNow(ctx context.Context, name string) (*corev1.Service, error) {
	return s.cluster.client.CoreV1().Services(s.cluster.Namespace).Get(ctx, name, metav1.GetOptions{})
}
