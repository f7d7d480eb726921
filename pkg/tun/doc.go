// Package tun is the device that packets come out of, the routes that lead to
// it, and the arithmetic that says which routes those are.
//
// It has three parts that know little of each other:
//
//   - cidr.go and plan.go are pure: prefixes in, prefixes out, with the world
//     (existing routes, own addresses) handed in. They are the same on every OS.
//   - A Link changes the machine: addresses, MTU, routes. It is known by name
//     only, so that a small privileged process can do this part and nothing else.
//   - A Device is the packets, and needs nothing but its descriptor. A privileged
//     process opens it and hands File over; FromFile makes a Device of it again
//     in the process that runs as the user.
//
// Nothing here is persistent. The device lives as long as a descriptor of it is
// open anywhere, and its addresses and routes go with it, so that whatever kills
// culvert also cleans up after it.
package tun
