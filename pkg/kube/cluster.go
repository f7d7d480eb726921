package kube

import (
	"log/slog"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// A Cluster is one API server, as one user, with one namespace to work in.
type Cluster struct {
	Context   string // name of the kubeconfig context
	Namespace string
	Server    string // URL of the API server

	client kubernetes.Interface
	config *rest.Config
	log    *slog.Logger
}
