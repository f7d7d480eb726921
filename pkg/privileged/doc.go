// Package privileged is the one part of culvert that runs as root: a small
// child that makes the TUN, its routes, the resolver's settings and sockets on
// port 53, and hands descriptors back. All that reads a network, a kubeconfig or
// a plugin's output stays in the process that runs as the user.
//
// # The wire
//
// The child's standard input is its end of a Unix socket pair: sudo and pkexec
// close every other descriptor. The user's side asks, the child answers, one
// frame each: four bytes of length, JSON, and descriptors as SCM_RIGHTS. The
// list of requests is short and fixed, each states all that is wanted, and each
// is validated here whatever the user's side did, since it is the user's.
//
// # The undo list
//
// The socket is what the child lives by. When it ends, whatever ended it, the
// child puts everything back and exits. Ctrl-C in the terminal reaches the child
// as well as culvert, so it ignores signals and waits for that end: kill -9 of
// culvert restores the machine.
//
// When the child itself is killed there is little left to put back, because
// nothing it makes is persistent: addresses, routes and per-link DNS go with the
// device, which the user's side closes when it sees the child gone. Only a bare
// resolv.conf outlives that. Close then starts another child to restore it, and
// if root is not to be had again without a question, so will the next session,
// or Clean.
package privileged
