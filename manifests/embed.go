// Package manifests is every object that culvert makes in a cluster, as the
// YAML that is sent there, so that what is reviewed is what is applied.
//
// A ${WORD} in a value is filled in by package kube after the YAML has been
// parsed, so no value can change the shape of an object; the files stay YAML
// that envsubst and kubectl understand. What depends on the namespace (owner
// references, pull secrets, resources fitted to its quota) is set there too.
package manifests

import "embed"

// FS holds the files of this folder.
//
//go:embed *.yaml
var FS embed.FS
