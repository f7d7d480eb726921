// Package deploy is the build machine's side of a deploy: the project's file, the tree that is
// built, and the rollout of it to hosts, each of which does its part itself (package release).
//
//	File       culvert.yaml, for one environment: Settings
//	Tree       what is shipped, hashed and cut
//	Rollout    wires to all hosts; plan, lock, ship to all, then batch by batch
//	SSH        one way to such wires: the user's own ssh, to hosts of a hub, too
//
// Nobody switches unless everybody has the release. A host that fails is put back by itself, and
// no other is begun. What a host is at it ends by itself, whatever becomes of this end; so the
// same line again goes on where the last one was left: the id of a tree that hosts have
// already is used again, those that run it are skipped, and batches are cut as before.
package deploy
