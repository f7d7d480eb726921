package deploy

import (
	"archive/tar"
	"archive/zip"
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// unpack unpacks an archive into a folder, and nowhere else.
func unpack(ctx context.Context, archive, into string) error {
	root, err := os.OpenRoot(into)
	if err != nil {
		return err
	}
	defer root.Close()
	if strings.HasSuffix(archive, ".zip") {
		return unzip(ctx, archive, root)
	}
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	r := io.Reader(bufio.NewReader(f))
	switch {
	case strings.HasSuffix(archive, ".tar.gz"), strings.HasSuffix(archive, ".tgz"):
		z, err := gzip.NewReader(r)
		if err != nil {
			return err
		}
		defer z.Close()
		r = z
	case strings.HasSuffix(archive, ".tar.zst"):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
		if err != nil {
			return err
		}
		defer z.Close()
		r = z
	case !strings.HasSuffix(archive, ".tar"):
		return errors.New("neither a folder nor .tar, .tar.gz, .tgz, .tar.zst or .zip")
	}
	return untar(ctx, tar.NewReader(r), root)
}

func untar(ctx context.Context, in *tar.Reader, root *os.Root) error {
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		name, mode := path.Clean(h.Name), fs.FileMode(h.Mode).Perm()
		switch h.Typeflag {
		case tar.TypeDir:
			err = put(root, name, fs.ModeDir|mode, nil)
		case tar.TypeReg:
			err = put(root, name, mode, in)
		case tar.TypeSymlink:
			if err = makeParent(root, name); err == nil {
				err = root.Symlink(h.Linkname, name)
			}
		case tar.TypeLink:
			if err = makeParent(root, name); err == nil {
				err = root.Link(path.Clean(h.Linkname), name)
			}
		case tar.TypeXGlobalHeader: // git archive's
		default:
			err = fmt.Errorf("entry of type %q", h.Typeflag)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

func unzip(ctx context.Context, archive string, root *os.Root) error {
	z, err := zip.OpenReader(archive)
	if err != nil {
		return err
	}
	defer z.Close()
	for _, f := range z.File {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := unzipFile(f, root); err != nil {
			return fmt.Errorf("%s: %w", f.Name, err)
		}
	}
	return nil
}

const longestLink = 4096

func unzipFile(f *zip.File, root *os.Root) error {
	name, mode := path.Clean(f.Name), f.Mode()
	if mode.IsDir() {
		return put(root, name, mode, nil)
	}
	in, err := f.Open()
	if err != nil {
		return err
	}
	defer in.Close()
	if mode&fs.ModeSymlink == 0 {
		return put(root, name, mode.Perm(), in)
	}
	target, err := io.ReadAll(io.LimitReader(in, longestLink))
	if err != nil {
		return err
	}
	if err := makeParent(root, name); err != nil {
		return err
	}
	return root.Symlink(string(target), name)
}

func makeParent(root *os.Root, name string) error {
	if dir := path.Dir(name); dir != "." {
		return root.MkdirAll(dir, 0o755)
	}
	return nil
}

// put makes a folder or a file, with its mode whatever the umask.
func put(root *os.Root, name string, mode fs.FileMode, in io.Reader) error {
	if mode.IsDir() {
		if name == "." {
			return nil
		}
		if err := root.MkdirAll(name, 0o755); err != nil {
			return err
		}
		return root.Chmod(name, mode.Perm()|0o700)
	}
	if err := makeParent(root, name); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, in); err != nil {
		f.Close()
		return err
	}
	return errors.Join(f.Close(), root.Chmod(name, mode.Perm()))
}
