//go:build !race

package wgchan

const underRace = false
