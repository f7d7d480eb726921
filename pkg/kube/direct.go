package kube

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Auto is the Endpoint at the addresses of the shadow's own node.
const Auto = "auto"

// published is the Service that leads past the API server, as it was last seen.
type published struct {
	mu   sync.Mutex
	root metav1.OwnerReference // of the session as it was last made
	of   types.UID             // the root that the Service hangs from
	port int32
	at   time.Time
}

// isNew tells that not every node may know the Service yet: kube-proxy writes its
// rules once a second.
func (p *published) isNew() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Since(p.at) < 5*time.Second
}

// DialDirect connects to the shadow's pod past the API server, at the Path's
// Endpoint. Where that names no port, one of the nodes is taken for it. avoid tells
// which addresses would lead round in a circle. ctx bounds the dial only.
func (s *Shadow) DialDirect(ctx context.Context, avoid func(netip.Addr) bool) (net.Conn, error) {
	for {
		conn, err := s.dialEndpoints(ctx, avoid)
		if err == nil || !errors.Is(err, syscall.ECONNREFUSED) || !s.published.isNew() {
			return conn, err
		}
		if pause(ctx, 200*time.Millisecond) != nil {
			return nil, err
		}
	}
}

func (s *Shadow) dialEndpoints(ctx context.Context, avoid func(netip.Addr) bool) (net.Conn, error) {
	at, err := s.endpoints(ctx, avoid)
	if err != nil {
		return nil, err
	}
	var errs []error
	for i, address := range at {
		conn, err := s.dialAt(ctx, address, len(at)-i)
		if err == nil {
			s.ways.arrived(Way("endpoint " + address))
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// dialAt has a fair share of what time is left for so many addresses.
func (s *Shadow) dialAt(ctx context.Context, address string, addresses int) (net.Conn, error) {
	ctx, cancel := share(ctx, addresses)
	defer cancel()
	raw, err := s.cluster.conns.dialApart(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	conn := newConn(Way("endpoint"), door{address, port, s.cfg.Path.Upgrade}, raw, raw, raw.Close)
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

// endpoints are where to dial, the best first.
func (s *Shadow) endpoints(ctx context.Context, avoid func(netip.Addr) bool) ([]string, error) {
	to := s.cfg.Path.Endpoint
	if _, _, err := net.SplitHostPort(to); err == nil {
		return []string{to}, nil
	}
	port, err := s.publish(ctx)
	if err != nil {
		return nil, fmt.Errorf("publish the shadow at its node: %w", sorted(err))
	}
	if to != Auto {
		return []string{net.JoinHostPort(to, strconv.Itoa(int(port)))}, nil
	}
	pod, err := s.readyPod(ctx)
	if err != nil {
		return nil, err
	}
	addrs := s.nodeAddrs(ctx, pod)
	addrs = slices.DeleteFunc(addrs, avoid)
	if len(addrs) == 0 {
		return nil, fmt.Errorf("the node of pod %s has no address outside of the cluster's ranges", pod.Name)
	}
	var at []string
	for _, a := range addrs {
		at = append(at, net.JoinHostPort(a.String(), strconv.Itoa(int(port))))
	}
	return at, nil
}

// nodeAddrs are those of the pod's node, its external ones first where the user may
// see them: Kubernetes tells the internal ones with the pod.
func (s *Shadow) nodeAddrs(ctx context.Context, pod *corev1.Pod) (all []netip.Addr) {
	add := func(text string) {
		if a, err := netip.ParseAddr(text); err == nil && !slices.Contains(all, a) {
			all = append(all, a)
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

// publish makes the Service, unless the present root has it.
func (s *Shadow) publish(ctx context.Context) (port int32, err error) {
	p := &s.published
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.root.UID == "" {
		return 0, fmt.Errorf("%w: session %s is not there", ErrGone, s.cfg.Session)
	}
	if p.of == p.root.UID {
		return p.port, nil
	}
	service := &corev1.Service{}
	if err := decode("direct.yaml", wordsOf(s.cfg, s.cluster.Namespace, s.holder), service); err != nil {
		return 0, err
	}
	service.SetOwnerReferences([]metav1.OwnerReference{p.root})
	made, err := makeOne(ctx, "service", s.cluster.client.CoreV1().Services(s.cluster.Namespace).Create, service)
	if apierrors.IsAlreadyExists(err) { // what was asked before had no answer
		made, err = s.cluster.client.CoreV1().Services(s.cluster.Namespace).Get(ctx, service.Name, metav1.GetOptions{})
	}
	if err != nil {
		return 0, err
	}
	if owners := made.GetOwnerReferences(); made.DeletionTimestamp != nil || len(owners) != 1 || owners[0].UID != p.root.UID {
		return 0, fmt.Errorf("service %s is still that of the shadow before", made.Name)
	}
	if made.Spec.Ports[0].NodePort == 0 {
		return 0, fmt.Errorf("service %s got no port of the nodes", made.Name)
	}
	p.of, p.port, p.at = p.root.UID, made.Spec.Ports[0].NodePort, time.Now()
	return p.port, nil
}
