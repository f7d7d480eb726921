// Package consultest is a Consul datacenter for tests: real agents on this machine.
package consultest
