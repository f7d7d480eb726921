package router

// A Match is what a request must be like. The zero value is like everything,
// also what is no HTTP.
type Match struct {
	Headers []Header `json:"headers,omitempty"` // all of them
	Path    string   `json:"path,omitempty"`    // prefix of the path
}

// A Header is one condition on the values of one header field.
type Header struct {
	Name  string `json:"name"`
	Kind  string `json:"kind"` // "exact", "prefix" or "regex"
	Value string `json:"value"`
}
