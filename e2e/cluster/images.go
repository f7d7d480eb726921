package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
)

const (
	nonroot = 65532 // the user that images run as
	nobody  = 65534 // the user here that runs what root may not
)

// An image is one layer of files and what is run from it.
type image struct {
	name       string // localhost/NAME:1
	entrypoint []string
	files      []file
}

// A file of an image: the content of another, or a link, or an empty folder.
type file struct {
	path    string // in the image, without a slash in front
	from    string // on this machine
	link    string // a symbolic link to that
	dir     bool
	mode    int64
	nonroot bool // belongs to the user that the image runs as
}

// buildImages makes the archives of all images in the cache, each under a hash
// of what is in it, and returns their paths. The first are needed first.
func buildImages(p paths, bin string) ([]string, error) {
	postgres, err := postgresImage(p)
	if err != nil {
		return nil, err
	}
	redis, err := redisImage()
	if err != nil {
		return nil, err
	}
	program := func(name string) image {
		return image{name: name, entrypoint: []string{"/" + name}, files: []file{{path: name, from: filepath.Join(bin, name), mode: 0o755}}}
	}
	client, err := clientImage(bin)
	if err != nil {
		return nil, err
	}
	var archives []string
	for _, img := range []image{program("pause"), program("coredns"), program("kit"), client, redis, postgres} {
		archive, err := img.build(filepath.Join(p.cache, "images"))
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", img.name, err)
		}
		archives = append(archives, archive)
	}
	// The product's own, where "make images" has made them.
	own, err := filepath.Glob(filepath.Join(p.root, "dist", "culvert-*.tar"))
	return append(archives, own...), err
}

// clientImage is a shell with kit.
func clientImage(bin string) (image, error) {
	img := image{name: "client", entrypoint: []string{"/bin/sh"}, files: []file{
		{path: "bin/busybox", from: "/bin/busybox", mode: 0o755},
		{path: "bin/kit", from: filepath.Join(bin, "kit"), mode: 0o755},
	}}
	list, err := output("/bin/busybox", "--list")
	for _, name := range strings.Fields(list) {
		if name != "busybox" {
			img.files = append(img.files, file{path: "bin/" + name, link: "busybox"})
		}
	}
	return img, err
}

// redisImage is Debian's redis and the libraries that it is linked with.
func redisImage() (image, error) {
	img := image{name: "redis", entrypoint: []string{"/usr/bin/redis-server"}}
	err := img.addPrograms("/usr/bin/redis-server", "/usr/bin/redis-cli")
	return img, err
}

// postgresImage is Debian's PostgreSQL with a data directory made already, so
// that a pod of it starts in no time.
func postgresImage(p paths) (image, error) {
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*")
	if len(dirs) == 0 {
		return image{}, fmt.Errorf("no PostgreSQL in /usr/lib/postgresql")
	}
	slices.Sort(dirs)
	home := dirs[len(dirs)-1]
	data, err := initdb(p, home)
	if err != nil {
		return image{}, err
	}
	img := image{name: "postgres", entrypoint: []string{home + "/bin/postgres", "-D", "/data"}}
	// The JIT alone would be three quarters of the image; PostgreSQL goes without.
	all := func(path string) bool {
		return !strings.Contains(path, "llvmjit") && !strings.Contains(path, "/bitcode")
	}
	programs := []string{home + "/bin/postgres", home + "/bin/psql", home + "/bin/pg_isready"}
	modules, _ := filepath.Glob(home + "/lib/*.so")
	if err := img.addPrograms(append(programs, slices.DeleteFunc(modules, func(m string) bool { return !all(m) })...)...); err != nil {
		return image{}, err
	}
	for _, tree := range []string{"/usr/share/postgresql/" + filepath.Base(home), "/usr/share/zoneinfo"} {
		if err := img.addTree(tree, tree[1:], false); err != nil {
			return image{}, err
		}
	}
	for _, program := range []string{"psql", "pg_isready"} {
		img.files = append(img.files, file{path: "bin/" + program, link: filepath.Join(home, "bin", program)})
	}
	return img, img.addTree(data, "data", true)
}

// initdb makes a data directory that trusts whoever comes, once a version.
func initdb(p paths, home string) (string, error) {
	version, err := output(home+"/bin/postgres", "--version")
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(version))
	dir := filepath.Join(p.cache, "images", fmt.Sprintf("initdb-%x", sum[:6]))
	if _, err := os.Stat(filepath.Join(dir, "PG_VERSION")); err == nil {
		return dir, nil
	}
	tmp, err := os.MkdirTemp("", "culvert-e2e-initdb-") // the cache may be out of the user's reach
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chown(tmp, nobody, nobody); err != nil {
		return "", err
	}
	cmd := exec.Command(home+"/bin/initdb", "-D", filepath.Join(tmp, "data"), "-U", "postgres", "--auth=trust", "--no-sync",
		"--wal-segsize=1", "--locale=C", "--encoding=UTF8")
	cmd.Dir = tmp
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("initdb: %w: %s", err, b)
	}
	hba := "local all all trust\nhost all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n"
	if err := os.WriteFile(filepath.Join(tmp, "data", "pg_hba.conf"), []byte(hba), 0o600); err != nil {
		return "", err
	}
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Dir(dir), 0o755)); err != nil {
		return "", err
	}
	return dir, command("cp", "-a", filepath.Join(tmp, "data"), dir)
}

// addPrograms adds programs where they are here, and the libraries that the
// loader would find for them.
func (img *image) addPrograms(paths ...string) error {
	libraries := regexp.MustCompile(`(/\S+) \(0x`)
	seen := map[string]bool{}
	add := func(path string) {
		if !seen[path] {
			seen[path] = true
			img.files = append(img.files, file{path: path[1:], from: path, mode: 0o755})
		}
	}
	for _, path := range paths {
		add(path)
		out, err := output("ldd", path)
		if err != nil {
			return err
		}
		for _, m := range libraries.FindAllStringSubmatch(out, -1) {
			add(m[1])
		}
	}
	return nil
}

// addTree adds a folder of this machine. Links that lead out of it are followed.
func (img *image) addTree(from, to string, nonroot bool) error {
	return filepath.Walk(from, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		f := file{path: to + strings.TrimPrefix(path, from), from: path, mode: int64(info.Mode().Perm()), nonroot: nonroot, dir: info.IsDir()}
		if info.Mode()&os.ModeSymlink != 0 {
			if target, err := os.Readlink(path); err == nil && !strings.HasPrefix(target, "/") {
				f.link = target
			}
			f.mode = 0o644
		}
		img.files = append(img.files, f)
		return nil
	})
}

// build writes a docker-archive (manifest, config, one layer) unless the cache
// has it.
func (img image) build(dir string) (string, error) {
	layer, err := img.layer()
	if err != nil {
		return "", err
	}
	diff := fmt.Sprintf("%x", sha256.Sum256(layer))
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{
			"Entrypoint": img.entrypoint, "Env": []string{"PATH=/bin:/usr/bin"}, "User": fmt.Sprintf("%d:%[1]d", nonroot),
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + diff}},
	})
	if err != nil {
		return "", err
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(config))
	path := filepath.Join(dir, img.name+"-"+sum[:12]+".tar")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	manifest, err := json.Marshal([]map[string]any{{
		"Config": sum + ".json", "RepoTags": []string{"localhost/" + img.name + ":1"}, "Layers": []string{diff + ".tar"},
	}})
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range []struct {
		name    string
		content []byte
	}{{sum + ".json", config}, {diff + ".tar", layer}, {"manifest.json", manifest}} {
		if err := put(w, &tar.Header{Name: e.name, Mode: 0o644}, e.content); err != nil {
			return "", err
		}
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	return path, writeWhole(path, out.Bytes())
}

// writeWhole replaces the older versions of an image, in one step.
func writeWhole(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", content, 0o644); err != nil {
		return err
	}
	name, _, _ := strings.Cut(filepath.Base(path), "-")
	older, _ := filepath.Glob(filepath.Join(filepath.Dir(path), name+"-*.tar"))
	for _, o := range older {
		_ = os.Remove(o)
	}
	return os.Rename(path+".new", path)
}

// layer is the files as a tar, with the folders above them, and users.
func (img image) layer() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	passwd := fmt.Sprintf("root:x:0:0::/:/bin/sh\nnonroot:x:%d:%[1]d::/tmp:/bin/sh\n", nonroot)
	made := map[string]bool{}
	if err := put(w, &tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, nil); err != nil {
		return nil, err
	}
	made["tmp"] = true
	if err := putParents(w, "etc/passwd", made); err != nil {
		return nil, err
	}
	if err := put(w, &tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte(passwd)); err != nil {
		return nil, err
	}
	for _, f := range img.files {
		if err := putParents(w, f.path, made); err != nil {
			return nil, err
		}
		if err := f.put(w); err != nil {
			return nil, err
		}
		made[f.path] = f.dir
	}
	err := w.Close()
	return out.Bytes(), err
}

func putParents(w *tar.Writer, path string, made map[string]bool) error {
	for i, c := range path {
		if c != '/' || made[path[:i]] {
			continue
		}
		made[path[:i]] = true
		if err := put(w, &tar.Header{Typeflag: tar.TypeDir, Name: path[:i+1], Mode: 0o755}, nil); err != nil {
			return err
		}
	}
	return nil
}

func (f file) put(w *tar.Writer) error {
	h := &tar.Header{Name: f.path, Mode: f.mode}
	if f.nonroot {
		h.Uid, h.Gid = nonroot, nonroot
	}
	switch {
	case f.dir:
		h.Typeflag, h.Name = tar.TypeDir, f.path+"/"
		return put(w, h, nil)
	case f.link != "":
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		return put(w, h, nil)
	}
	content, err := os.ReadFile(f.from)
	if err != nil {
		return err
	}
	return put(w, h, content)
}

func put(w *tar.Writer, h *tar.Header, content []byte) error {
	h.Size = int64(len(content))
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}
