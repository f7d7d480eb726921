// images builds the container images of this repository without a Docker
// engine: one static binary on an empty base, for each platform, in one OCI
// archive a name. docker load, podman load, skopeo and ctr images import read
// those. The same sources and Go version make the same bytes.
package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// A program is one image: the package of its binary and the image's name.
type program struct{ pkg, name string }

var programs = []program{{"./cmd/shadow", "shadow"}, {"./cmd/hub", "hub"}}

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var b builder
	flag.StringVar(&b.dist, "o", "dist", "`folder` that the archives are written to")
	flag.StringVar(&b.version, "version", "dev", "`version` that the programs say they are")
	flag.StringVar(&b.tag, "tag", "dev", "`tag` of the images")
	flag.StringVar(&b.repository, "repository", "localhost", "`prefix` of the images' names")
	flag.Parse()
	b.architectures = []string{"amd64", "arm64"}
	for _, p := range programs {
		path, err := b.archive(ctx, p)
		if err != nil {
			log.Fatalf("images: error: %v", err)
		}
		fmt.Println(path)
	}
}

type builder struct {
	dist, version, tag, repository string
	architectures                  []string
}

// archive builds a program for every platform into one file.
func (b builder) archive(ctx context.Context, p program) (string, error) {
	tmp, err := os.MkdirTemp("", "culvert-images-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range b.architectures {
		img, err := b.image(ctx, p, arch, filepath.Join(tmp, arch))
		if err != nil {
			return "", fmt.Errorf("build %s for linux/%s: %w", p.pkg, arch, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	dir := filepath.Join(tmp, "layout")
	if err := b.writeLayout(dir, p, index); err != nil {
		return "", err
	}
	if err := os.MkdirAll(b.dist, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(b.dist, "culvert-"+p.name+".tar")
	return path, writeTar(path, dir)
}

// writeLayout writes an index of indexes, as archives of several platforms are
// told apart by their names.
func (b builder) writeLayout(dir string, p program, index v1.ImageIndex) error {
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	ref := fmt.Sprintf("%s/culvert-%s:%s", b.repository, p.name, b.tag)
	return l.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          ref, // what containerd and docker call it
		"org.opencontainers.image.ref.name": b.tag,
	}))
}

func (b builder) image(ctx context.Context, p program, arch, dir string) (v1.Image, error) {
	binary := filepath.Join(dir, p.name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags=-s -w -X main.version="+b.version, "-o", binary, p.pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return nil, err
	}
	content, err := os.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	layer, err := oneFile(p.name, content)
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.AppendLayers(img, layer)
	if err != nil {
		return nil, err
	}
	return b.configure(img, p, arch)
}

func (b builder) configure(img v1.Image, p program, arch string) (v1.Image, error) {
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", arch, v1.Time{Time: epoch}
	config.Config = v1.Config{
		User: "65532:65532", Entrypoint: []string{"/" + p.name}, WorkingDir: "/",
		Labels: map[string]string{
			"org.opencontainers.image.source":  "https://github.com/culvert-dev/culvert",
			"org.opencontainers.image.title":   "culvert-" + p.name,
			"org.opencontainers.image.version": b.version,
		},
	}
	for i := range config.History {
		config.History[i].Created = v1.Time{Time: epoch}
	}
	return mutate.ConfigFile(img, config)
}

// epoch is the time of everything, so that archives can be compared.
var epoch = time.Unix(0, 0).UTC()

// oneFile is a layer of one executable at the root.
func oneFile(name string, content []byte) (v1.Layer, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := put(w, name, 0o755, content); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(out.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
}

// writeTar packs a folder, in the order of names, and puts the file in place
// when it is whole.
func writeTar(path, dir string) error {
	f, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		inside, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		return put(w, filepath.ToSlash(inside), 0o644, content)
	})
	if err := errors.Join(err, w.Close(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(path+".new", path)
}

func put(w *tar.Writer, name string, mode int64, content []byte) error {
	err := w.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content)), ModTime: epoch, Format: tar.FormatUSTAR,
	})
	if err != nil {
		return err
	}
	_, err = w.Write(content)
	return err
}
