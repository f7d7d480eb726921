// Package release is a host's side of a deploy, and the wire that leads to it: "culvert
// apply" serves it on its standard input and output, over ssh or through a hub.
//
// # On the host
//
//	<to>/releases/ID      a tree that is whole: it is renamed to there when it has been verified
//	<to>/shared           what outlives releases; each has links to it
//	<to>/current          a link to releases/ID, changed by rename(2)
//	<to>/.culvert         the lock, the log, a manifest of each release
//
// # The wire
//
// Both ends write frames: the length of the payload in four bytes, big-endian, one byte for
// its kind, the payload. What the deployer asks is answered once, in its order; events may
// come before the answer. Both ends send a beat when they have nothing else to say, so that
// either knows when the other has gone without a word. Client is the deployer's end.
//
//	hello      who asks, for which app, with which settings -> what is here, and what is wrong with it
//	lock       until the wire is gone; what a killed apply has left is repaired first
//	offer      a manifest -> the pieces that are not here; with plan nothing is changed
//	ship       those, as data; then the release is verified, and in releases/
//	activate   drain, pre_release, switch, restart, gate, undrain, post_release; or all of it put back.
//	           It finishes by itself if that is asked
//	finish     the release is good; old ones are pruned
//	revert     back to the release before
//	rollback   which one would be gone back to; activate then does it
//	restart    drain, restart, gate, undrain
//	list       the releases
//	exec       a command, in current
//
// What takes no decision between is asked together, a deploy is four round trips: hello, lock
// with offer, ship, and activate that finishes. Hosts far away answer no sooner.
//
// When the wire is gone the host ends by itself what activate has begun: it marks the
// release good, or puts the one before back. Before that it leaves nothing but a folder
// .incoming-ID, which the next offer goes on with.
package release
