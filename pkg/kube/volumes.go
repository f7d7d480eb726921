package kube

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// marker is the file that says, in a directory of copies, which files are ours:
// a line for each, its checksum and its name.
const marker = ".culvert-volumes"

// CopyVolumes writes what a container of a pod has mounted to dir, each file
// below its mount path: ConfigMaps, Secrets, the downward API and projections
// of them, a new token of its service account included. They are what they are
// now, and not renewed. Other volumes are not copied; a notice names each that
// holds data, and each thing that the user may not read. The container is
// chosen as for Environment.
//
// All is for the user alone: new directories are 0700, and files of Secrets and
// tokens can be read by nobody else, whatever their mode is in the pod. Files
// from an earlier copy are replaced as long as nobody changed them. If there is
// any other file in the way nothing is written, and errors.Is(err,
// fs.ErrExist); after an error nothing of what was written stays.
//
// It takes the rights of Environment, Services aside, and for a token to
// create serviceaccounts/token.
func (c *Cluster) CopyVolumes(ctx context.Context, pod, container, dir string) (copied, notices []string, err error) {
	v, err := c.viewPod(ctx, pod, container)
	if err != nil {
		return nil, nil, err
	}
	w := wants{}
	for _, m := range v.container.VolumeMounts {
		w.volume(v, volumeOf(v.pod, m.Name))
		if m.SubPathExpr != "" {
			w.services = true
			w.environment(v)
		}
	}
	if err := c.read(ctx, v, w); err != nil {
		return nil, nil, err
	}
	t := v.tree()
	copied, err = t.write(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("copy the volumes of pod %s to %s: %w", pod, dir, err)
	}
	return copied, t.notices, nil
}

// RemoveVolumes removes from dir what CopyVolumes wrote there, as far as nobody
// changed it, and the directories below dir that are empty then.
func RemoveVolumes(dir string) error {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	old, err := ours(root)
	if err != nil {
		return err
	}
	return forget(root, old)
}

func volumeOf(pod *corev1.Pod, name string) *corev1.Volume {
	for i := range pod.Spec.Volumes {
		if pod.Spec.Volumes[i].Name == name {
			return &pod.Spec.Volumes[i]
		}
	}
	return &corev1.Volume{Name: name}
}

// volume adds what a volume refers to.
func (w *wants) volume(v *podView, volume *corev1.Volume) {
	for _, p := range projections(volume) {
		switch {
		case p.ConfigMap != nil:
			w.holds = append(w.holds, configMapOf(p.ConfigMap.Name))
		case p.Secret != nil:
			w.holds = append(w.holds, secretOf(p.Secret.Name))
		case p.ServiceAccountToken != nil:
			w.tokens = append(w.tokens, p.ServiceAccountToken)
		case p.DownwardAPI != nil:
			for _, item := range p.DownwardAPI.Items {
				w.node = w.node || item.ResourceFieldRef != nil && v.needsNode(item.ResourceFieldRef)
			}
		}
	}
}

// projections are the sources of a volume that can be copied: every sort of it
// is a projection, or one with a single source.
func projections(v *corev1.Volume) []corev1.VolumeProjection {
	switch {
	case v.ConfigMap != nil:
		return []corev1.VolumeProjection{{ConfigMap: &corev1.ConfigMapProjection{
			LocalObjectReference: v.ConfigMap.LocalObjectReference, Items: v.ConfigMap.Items, Optional: v.ConfigMap.Optional,
		}}}
	case v.Secret != nil:
		return []corev1.VolumeProjection{{Secret: &corev1.SecretProjection{
			LocalObjectReference: corev1.LocalObjectReference{Name: v.Secret.SecretName}, Items: v.Secret.Items, Optional: v.Secret.Optional,
		}}}
	case v.DownwardAPI != nil:
		return []corev1.VolumeProjection{{DownwardAPI: &corev1.DownwardAPIProjection{Items: v.DownwardAPI.Items}}}
	case v.Projected != nil:
		return v.Projected.Sources
	}
	return nil
}

// defaultMode is that of the volume's files.
func defaultMode(v *corev1.Volume) *int32 {
	switch {
	case v.ConfigMap != nil:
		return v.ConfigMap.DefaultMode
	case v.Secret != nil:
		return v.Secret.DefaultMode
	case v.DownwardAPI != nil:
		return v.DownwardAPI.DefaultMode
	case v.Projected != nil:
		return v.Projected.DefaultMode
	}
	return nil
}

// A tree is what will be written: files and directories by their names below
// the directory, with slashes.
type tree struct {
	files   map[string]file
	dirs    map[string]bool
	notices []string
}

type file struct {
	data []byte
	mode fs.FileMode
}

func (t *tree) note(format string, args ...any) {
	if line := fmt.Sprintf(format, args...); !slices.Contains(t.notices, line) {
		t.notices = append(t.notices, line)
	}
}

// tree is all that the container has mounted. What is mounted deeper lies on
// top.
func (v *podView) tree() *tree {
	t := &tree{files: map[string]file{}, dirs: map[string]bool{}}
	mounts := slices.Clone(v.container.VolumeMounts)
	depth := func(m corev1.VolumeMount) int { return strings.Count(path.Clean("/"+m.MountPath), "/") }
	slices.SortStableFunc(mounts, func(a, b corev1.VolumeMount) int { return depth(a) - depth(b) })
	contents := map[string]map[string]file{} // a volume may be mounted twice
	for _, m := range mounts {
		volume := volumeOf(v.pod, m.Name)
		t.hide(m.MountPath)
		if projections(volume) == nil && volume.Projected == nil {
			t.other(volume, m)
			continue
		}
		if contents[m.Name] == nil {
			contents[m.Name] = v.contents(t, volume)
		}
		t.mount(m.MountPath, v.subPath(t, m), contents[m.Name])
	}
	return t
}

// hide takes away what a new mount covers.
func (t *tree) hide(mountPath string) {
	at := below(mountPath)
	covered := func(name string) bool { return at == "." || name == at || strings.HasPrefix(name, at+"/") }
	maps.DeleteFunc(t.files, func(name string, _ file) bool { return covered(name) })
	maps.DeleteFunc(t.dirs, func(name string, _ bool) bool { return covered(name) })
}

// below is a path of the container, relative to its root.
func below(mountPath string) string {
	return path.Join(".", strings.TrimPrefix(path.Clean("/"+mountPath), "/"))
}

// other tells of a volume that is not copied. An emptyDir holds nothing to
// begin with.
func (t *tree) other(v *corev1.Volume, m corev1.VolumeMount) {
	if v.EmptyDir == nil {
		t.note("volume %s at %s is not a ConfigMap, a Secret or the like: it is not copied", v.Name, m.MountPath)
	}
}

// mount puts a volume in, or the part of it below sub.
func (t *tree) mount(mountPath, sub string, contents map[string]file) {
	at := below(mountPath)
	if f, ok := contents[sub]; ok {
		t.files[at] = f
		return
	}
	t.dirs[at] = true
	part := partOf(contents, sub)
	if len(part) == 0 && len(contents) > 0 {
		t.note("there is no %s in the volume at %s: it is empty", sub, mountPath)
	}
	for name, f := range part {
		t.files[path.Join(at, name)] = f
	}
}

func partOf(contents map[string]file, sub string) map[string]file {
	if sub == "." {
		return contents
	}
	part := map[string]file{}
	for name, f := range contents {
		if rest, ok := strings.CutPrefix(name, sub+"/"); ok {
			part[rest] = f
		}
	}
	return part
}

// subPath is the part of the volume that is mounted, "." for all of it.
func (v *podView) subPath(t *tree, m corev1.VolumeMount) string {
	sub := m.SubPath
	if m.SubPathExpr != "" {
		sub = expand(m.SubPathExpr, v.environment().values)
		if strings.Contains(sub, "$(") {
			t.note("%s at %s holds a variable that is not known", m.SubPathExpr, m.MountPath)
		}
	}
	return path.Clean(sub)
}

// contents are the files of a volume.
func (v *podView) contents(t *tree, volume *corev1.Volume) map[string]file {
	mode := int32(0o644)
	if m := defaultMode(volume); m != nil {
		mode = *m
	}
	all := map[string]file{}
	for _, p := range projections(volume) {
		switch {
		case p.ConfigMap != nil:
			v.copyHolding(t, all, configMapOf(p.ConfigMap.Name), p.ConfigMap.Items, p.ConfigMap.Optional, mode)
		case p.Secret != nil:
			v.copyHolding(t, all, secretOf(p.Secret.Name), p.Secret.Items, p.Secret.Optional, mode&0o700)
		case p.DownwardAPI != nil:
			v.copyFields(t, all, p.DownwardAPI.Items, mode)
		case p.ServiceAccountToken != nil:
			v.copyToken(t, all, p.ServiceAccountToken, mode&0o700)
		default:
			t.note("volume %s has a source of a kind that is not supported: it is left out", volume.Name)
		}
	}
	return all
}

// put adds a file that its owner, who is not the container's user, can read.
func (t *tree) put(all map[string]file, name string, data []byte, mode int32) {
	if name = path.Clean(name); !fs.ValidPath(name) {
		t.note("%q leads out of the volume: it is left out", name)
		return
	}
	all[name] = file{data: data, mode: fs.FileMode(mode)&0o777 | 0o400}
}

// copyHolding takes a ConfigMap or Secret, or the items of it.
func (v *podView) copyHolding(t *tree, all map[string]file, what string, items []corev1.KeyToPath, optional *bool, mode int32) {
	if l, lost := v.lost[what]; lost {
		if err := l.err(optional); err != errOptional {
			t.note("%s: its files are left out", err)
		}
		return
	}
	files := v.holds[what].files
	if len(items) == 0 {
		for name, data := range files {
			t.put(all, name, data, mode)
		}
	}
	for _, item := range items {
		data, ok := files[item.Key]
		if !ok && !isTrue(optional) {
			t.note("%s has no key %s: file %s is left out", what, item.Key, item.Path)
		}
		if ok {
			t.put(all, item.Path, data, itemMode(item.Mode, what, mode))
		}
	}
}

func itemMode(mode *int32, what string, fallback int32) int32 {
	switch {
	case mode == nil:
		return fallback
	case strings.HasPrefix(what, secretOf("")):
		return *mode & 0o700
	}
	return *mode
}

func (v *podView) copyFields(t *tree, all map[string]file, items []corev1.DownwardAPIVolumeFile, mode int32) {
	for _, item := range items {
		value, err := "", errors.New("its source is of an unknown kind")
		switch {
		case item.FieldRef != nil:
			value, err = fieldOf(v.pod, item.FieldRef.FieldPath)
		case item.ResourceFieldRef != nil:
			value, err = v.resource(item.ResourceFieldRef)
		}
		if err != nil {
			t.note("%s: file %s is left out", err, item.Path)
			continue
		}
		t.put(all, item.Path, []byte(value), itemMode(item.Mode, "", mode))
	}
}

func (v *podView) copyToken(t *tree, all map[string]file, p *corev1.ServiceAccountTokenProjection, mode int32) {
	token, ok := v.tokens[p]
	if !ok {
		t.note("%s: file %s is left out", v.lost[tokenOf(v.pod)].why, p.Path)
		return
	}
	t.put(all, p.Path, []byte(token), mode)
}

// write puts the tree into dir, or leaves dir as it was.
func (t *tree) write(dir string) (copied []string, err error) {
	for _, name := range slices.Concat(slices.Collect(maps.Keys(t.files)), slices.Collect(maps.Keys(t.dirs))) {
		_, isFile := t.files[name]
		if !filepath.IsLocal(filepath.FromSlash(name)) || isFile && name == "." || name == marker {
			return nil, fmt.Errorf("%s: not a name for a copy", name)
		}
	}
	made, err := makeDir(dir)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, errors.Join(err, made.undo(os.Remove))
	}
	defer root.Close()
	if err := t.into(root); err != nil {
		return nil, errors.Join(err, made.undo(os.Remove))
	}
	for _, name := range slices.Sorted(maps.Keys(t.files)) {
		copied = append(copied, filepath.Join(dir, filepath.FromSlash(name)))
	}
	return copied, nil
}

// written are names in the order in which they were made.
type written []string

// undo removes them, the last one first. What else has come to be in a
// directory meanwhile keeps it, and is no failure.
func (w written) undo(remove func(string) error) error {
	var errs []error
	for _, name := range slices.Backward(w) {
		if err := remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// makeDir makes dir and what is missing above it.
func makeDir(dir string) (made written, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	var missing []string
	for at := dir; ; at = filepath.Dir(at) {
		if _, err := os.Stat(at); !errors.Is(err, fs.ErrNotExist) || at == filepath.Dir(at) {
			break
		}
		missing = append(missing, at)
	}
	for _, at := range slices.Backward(missing) {
		if err := os.Mkdir(at, 0o700); err != nil {
			return nil, errors.Join(err, made.undo(os.Remove))
		}
		made = append(made, at)
	}
	return made, nil
}

// into looks for what is in the way, and only then changes anything. The
// root keeps every name below it, whatever links there are.
func (t *tree) into(root *os.Root) (err error) {
	old, err := ours(root)
	if err != nil {
		return err
	}
	if err := t.fits(root, old); err != nil {
		return err
	}
	if err := forget(root, old); err != nil {
		return err
	}
	var made written
	defer func() {
		if err != nil {
			err = errors.Join(err, made.undo(root.Remove))
		}
	}()
	// The marker comes first: what a crash leaves behind is known as ours.
	if err := t.mark(root, &made); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(t.dirs)) {
		if err := mkdirs(root, name, &made); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.files)) {
		if err := create(root, name, t.files[name], &made); err != nil {
			return err
		}
	}
	return nil
}

// fits tells whether nothing is in the way but what is ours.
func (t *tree) fits(root *os.Root, old map[string]bool) error {
	ways := maps.Clone(t.dirs)
	for _, name := range slices.Sorted(maps.Keys(t.files)) {
		ways[path.Dir(name)] = true
		if _, err := root.Lstat(name); err == nil && !old[name] {
			return fmt.Errorf("%s: %w", name, fs.ErrExist)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(ways)) {
		for at := name; at != "."; at = path.Dir(at) {
			if info, err := root.Lstat(at); err == nil && !info.IsDir() && !old[at] {
				return fmt.Errorf("%s: %w", at, fs.ErrExist)
			}
		}
	}
	return nil
}

// ours are the files of an earlier copy that are as they were written.
func ours(root *os.Root) (map[string]bool, error) {
	text, err := root.ReadFile(marker)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	known := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		sum, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		info, err := root.Lstat(name)
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		if data, err := root.ReadFile(name); err == nil && sum == checksum(data) {
			known[name] = true
		}
	}
	return known, nil
}

func checksum(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// forget removes an earlier copy: a Secret that is gone must not stay.
func forget(root *os.Root, old map[string]bool) error {
	for _, name := range slices.Sorted(maps.Keys(old)) {
		if err := root.Remove(name); err != nil {
			return err
		}
		for at := path.Dir(name); at != "." && root.Remove(at) == nil; at = path.Dir(at) {
		}
	}
	if err := root.Remove(marker); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (t *tree) mark(root *os.Root, made *written) error {
	var text bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(t.files)) {
		fmt.Fprintln(&text, checksum(t.files[name].data), name)
	}
	return create(root, marker, file{data: text.Bytes(), mode: 0o600}, made)
}

// create writes a file that is not there yet.
func create(root *os.Root, name string, f file, made *written) error {
	if err := mkdirs(root, path.Dir(name), made); err != nil {
		return err
	}
	out, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	*made = append(*made, name)
	_, err = out.Write(f.data)
	return errors.Join(err, out.Chmod(f.mode), out.Close())
}

// mkdirs makes the directories that are missing on the way to name.
func mkdirs(root *os.Root, name string, made *written) error {
	at := "."
	for part := range strings.SplitSeq(path.Clean(name), "/") {
		at = path.Join(at, part)
		switch info, err := root.Lstat(at); {
		case errors.Is(err, fs.ErrNotExist):
			if err := root.Mkdir(at, 0o700); err != nil {
				return err
			}
			*made = append(*made, at)
		case err != nil:
			return err
		case !info.IsDir():
			return fmt.Errorf("%s: %w", at, fs.ErrExist)
		}
	}
	return nil
}
