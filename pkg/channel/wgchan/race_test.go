//go:build race

package wgchan

// underRace tells that memory is no measure.
const underRace = true
