// Package pkg is the map of culvert. It holds no code but the test that holds
// the code to it.
//
// # One idea
//
// A channel.Network dials and listens. This machine is one; what the far end of
// a wire serves is another. To connect is to dial, on the far Network, every
// flow that comes out of the TUN; to exchange is to listen on the far Network and
// to dial on this machine.
//
// # Rooms, from the top
//
//	cmd/culvert, shadow, hub     main functions
//	cli                          a file per verb: flags, words for people, exit codes
//	cli/rollouts                 the verbs of a deploy, and what they run on a host
//	cli/hubs                     the verbs of a hub, which know no cluster
//	session                      what a verb does: parts put together, run, undone
//	shadow      privileged       the far end in the pod; the root child on the laptop
//	sandbox                      a command in a network of its own, without root
//	kube        kube/heal        all that is said to the API server, from each side
//	hub                          hosts that can only dial out, by name; the agent of one
//	router      redirect         which laptop gets a request, or the original; ports taken from a pod
//	tun                          the device and its routes
//	dns         resolver         the server and its zone; how the OS is told of it
//	deploy                       a project's file, its tree, and the rollout to hosts
//	proxy                        SOCKS5 and HTTP, for programs that know of proxies
//	channel/wires                which wire: either end of one, by name
//	channel/wgchan, openssh      both ends over WireGuard, where UDP gets through; a wire of the user's own ssh
//	netstack                     packets to flows to dials
//	channel/resume               a stream that outlives the hub it goes by
//	channel/tlschan, sshchan     both ends over TLS, between ends of ours; over SSH, towards any end
//	relay                        two connections joined
//	release                      a host's side of a deploy, and the wire that leads to it
//	process                      a command run as a part of this one
//	ca                           certificates of SSH, and the tokens that they are given for
//	strangers                    those who have come and not yet shown who they are
//	fdpass                       descriptors handed to the process that started us
//	channel/memchan              a Network in memory: who dials meets who listens
//	channel                      the one word: Network, Channel, this machine's Host
//	cli/talk    cgroup           results, talk and exit codes; what a container may use
//	catalog     manifests        the names of a cluster as values; what is applied to one
//	consul                       a service's instances in Consul's registry, restarted one by one
//
// Imports point down, and rooms of one line do not import each other; see
// arrows_test.go, which also fences the large libraries in.
//
// # The way of a packet
//
// curl http://web.shop: kernel route -> tun -> netstack (dials first, answers
// the SYN after) -> channel.Keep -> tlschan -> the API server -> shadow
// (channel.Host) -> the Service's virtual IP -> and back, through relay.
//
// Where the present wire is WireGuard's, netstack only looks whether it has the flow:
// else the packet goes on as it is, wgchan -> UDP -> shadow, whose netstack dials.
//
// Without a device programs come by a socket: culvert forward -> relay, culvert proxy ->
// proxy -> session, which says whose a host is -> channel.Keep, and on as above, or this
// machine's own sockets.
//
// # The way back
//
// A client in the cluster asks svc/web: the Service's virtual IP -> the router's
// pod: shadow -> router (looks at the request, picks a claim) -> memchan ->
// tlschan -> the API server -> channel.Keep -> relay.Forward (dials the local
// process, and only then takes the connection) -> the process. No claim, no
// laptop, a refused dial: the original pods, by a Service beside the first.
//
// What is sent to a pod's own address is taken in that pod: redirect leads it to a
// shadow beside the program, and from there on it goes the same way.
//
// # The way to a host
//
// ssh -J hub db-01: hub (reads the first bytes; asks the rights) -> its Registry, a Network
// of names, or that of another hub -> the wire of who listens there -> agent, or any ssh -R
// -> the port that was offered. Of our own are dial, for its stdin and stdout, and forward
// --hub, both by a wire that is opened again. A job of CI comes with a certificate, which the hub's ca has
// given it for a token of its issuer's. A hub is the far end of a wire as a shadow is, with another
// Network.
//
// # The way of a release
//
// culvert deploy: deploy (builds, reads and hashes the tree; asks all hosts, ships to all, switches
// them batch by batch) -> the user's ssh, or that through a hub -> culvert apply on the host:
// release (verifies, renames, restarts, looks whether it works, or puts it back). What a host is
// at it ends by itself; the two ends speak frames over one stream. A workload is kube's; whether
// a pod that was restarted is well is asked at its own address, by a shadow of session's.
//
// # The way of a name
//
// The kernel asks dns on the TUN's own address, or where port 53 of that is somebody
// else's on another one, by way of tun and netstack, because resolver said so ->
// dns.Zone, filled by kube.Watch through a catalog.Sink. What the zone may not
// hold for lack of rights is asked of the cluster's own DNS through the channel;
// what is not the cluster's goes to the machine's own nameservers, never
// through the tunnel. On a bare resolv.conf another session's server may be between.
//
// # Without root
//
// A command that is run in a sandbox has a device for all that it sends. The same
// netstack makes flows of it, and session decides for each whose it is: the cluster's
// by the wire, names to dns, all else to this machine's own sockets.
//
// # What is changed, and who undoes it
//
// On the laptop privileged changes things and undoes them when its pipe closes,
// whoever closed it. In the cluster everything hangs from one object; session
// deletes it, or the shadow does when the laptop has been silent for the grace
// time, or has left while DNS may still lead clients to the shadow, or "culvert
// clean" from any machine. An exchanged Service bears its original selector; the
// same three put it back (kube/heal judges how). A workload that was scaled to
// nothing bears its number, and whoever still holds the exchange puts it back, too.
package pkg
