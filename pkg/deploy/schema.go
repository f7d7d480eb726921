package deploy

import (
	"encoding/json"
	"fmt"
	"reflect"

	"github.com/google/jsonschema-go/jsonschema"
)

// Schema is that of a culvert.yaml, for editors and for those who check without us. What
// it lets through may still be refused: it knows keys, not hosts.
func Schema() ([]byte, error) {
	text := &jsonschema.Schema{Type: "string"}
	texts := func(what *jsonschema.Schema) *jsonschema.Schema {
		return &jsonschema.Schema{AnyOf: []*jsonschema.Schema{what, {Type: "array", Items: what}}}
	}
	number := func(n float64) *float64 { return &n }
	known := map[reflect.Type]*jsonschema.Schema{
		reflect.TypeFor[Script]():   texts(text),
		reflect.TypeFor[Duration](): {Type: "string", Pattern: `^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$`},
		reflect.TypeFor[Batch](): {Type: "array", Items: &jsonschema.Schema{AnyOf: []*jsonschema.Schema{
			{Type: "integer", Minimum: number(1)}, {Type: "string", Pattern: `^[0-9]+%?$`},
		}}},
		reflect.TypeFor[Hosts](): {AnyOf: []*jsonschema.Schema{
			texts(text), {Type: "object", AdditionalProperties: texts(text)},
		}},
	}
	for _, short := range []struct {
		of      reflect.Type
		pattern string
	}{
		{reflect.TypeFor[Drain](), `^consul \S`},
		{reflect.TypeFor[Health](), `^(get|tcp|cmd) \S`},
		{reflect.TypeFor[K8s](), `^(deployment|statefulset|daemonset)/\S`},
	} {
		long, err := jsonschema.ForType(short.of, &jsonschema.ForOptions{TypeSchemas: known})
		if err != nil {
			return nil, fmt.Errorf("schema of %v: %w", short.of, err)
		}
		known[short.of] = &jsonschema.Schema{AnyOf: []*jsonschema.Schema{{Type: "string", Pattern: short.pattern}, long}}
	}
	s, err := jsonschema.For[File](&jsonschema.ForOptions{TypeSchemas: known})
	if err != nil {
		return nil, fmt.Errorf("schema of culvert.yaml: %w", err)
	}
	s.Schema, s.Title = "https://json-schema.org/draft/2020-12/schema", FileName
	for _, of := range []*jsonschema.Schema{s, s.Properties["envs"].AdditionalProperties} {
		of.Properties["restart"].Pattern = `^(systemd|supervisor|pm2|http|cmd) \S`
		of.Properties["on_fail"].Enum = []any{Restore, RollbackAll}
	}
	b, err := json.MarshalIndent(s, "", "  ")
	return append(b, '\n'), err
}
