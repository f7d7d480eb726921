package main

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// testBuilder builds this very program, which is smaller than the others.
func testBuilder(t *testing.T) (builder, program) {
	t.Helper()
	return builder{
		dist: t.TempDir(), version: "v1.2.3", tag: "dev", repository: "localhost", architectures: []string{"amd64", "arm64"},
	}, program{pkg: ".", name: "images"}
}

func TestArchiveIsAValidIndexOfBothPlatforms(t *testing.T) {
	b, p := testBuilder(t)
	path, err := b.archive(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	outer, err := layout.ImageIndexFromPath(unpack(t, path))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(outer); err != nil {
		t.Fatal(err)
	}
	top, err := outer.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(top.Manifests) != 1 || top.Manifests[0].Annotations["io.containerd.image.name"] != "localhost/culvert-images:dev" {
		t.Fatalf("the archive names %+v", top.Manifests)
	}
	inner, err := outer.ImageIndex(top.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	platforms, err := inner.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for i, arch := range b.architectures {
		m := platforms.Manifests[i]
		if m.Platform == nil || m.Platform.Architecture != arch {
			t.Fatalf("manifest %d is for %v, want %s", i, m.Platform, arch)
		}
		checkImage(t, inner, m.Digest, arch)
	}
}

func checkImage(t *testing.T, index v1.ImageIndex, digest v1.Hash, arch string) {
	t.Helper()
	img, err := index.Image(digest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.Architecture != arch || config.Config.User != "65532:65532" || config.Config.Entrypoint[0] != "/images" {
		t.Errorf("config of %s: %+v", arch, config)
	}
}

func TestSameSourcesSameBytes(t *testing.T) {
	b, p := testBuilder(t)
	b.architectures = b.architectures[:1]
	var archives [2][]byte
	for i := range archives {
		path, err := b.archive(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if archives[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("two builds differ")
	}
}

func unpack(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, h.Name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
