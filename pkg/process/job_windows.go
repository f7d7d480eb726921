package process

import (
	"context"
	"errors"
	"os/exec"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
)

// run puts the command into a job that ends when its last handle is closed, and
// the only one is ours. A Ctrl-C on the console reaches the command by itself;
// there is no other polite word.
func run(ctx context.Context, cmd *exec.Cmd, cfg Config) (end exit, err error) {
	job, err := newJob()
	if err != nil {
		return exit{}, err
	}
	defer windows.CloseHandle(job)
	settled, err := launch(cmd, cfg)
	if err != nil {
		return exit{}, err
	}
	if err := assign(job, cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		return exit{}, errors.Join(err, cmd.Wait())
	}
	done := make(chan error, 1)
	go func() {
		if settled != nil {
			<-settled
			cfg.Settled()
		}
		done <- cmd.Wait()
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		end.told = true
		if errors.Is(context.Cause(ctx), ErrInterrupt) {
			select {
			case <-done:
				return end, nil
			case <-time.After(cfg.Patience):
			}
		}
		_ = windows.TerminateJobObject(job, 1)
		<-done
		return end, nil
	}
	var failed *exec.ExitError
	if errors.As(err, &failed) {
		end.Code, err = failed.ExitCode(), nil
	}
	return end, err
}

func newJob() (windows.Handle, error) {
	job, err := windows.CreateJobObject(nil, nil)
	if err != nil {
		return 0, err
	}
	info := windows.JOBOBJECT_EXTENDED_LIMIT_INFORMATION{}
	info.BasicLimitInformation.LimitFlags = windows.JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
	_, err = windows.SetInformationJobObject(job, windows.JobObjectExtendedLimitInformation, uintptr(unsafe.Pointer(&info)), uint32(unsafe.Sizeof(info)))
	if err != nil {
		windows.CloseHandle(job)
		return 0, err
	}
	return job, nil
}

func assign(job windows.Handle, pid int) error {
	process, err := windows.OpenProcess(windows.PROCESS_SET_QUOTA|windows.PROCESS_TERMINATE, false, uint32(pid))
	if err != nil {
		return err
	}
	defer windows.CloseHandle(process)
	return windows.AssignProcessToJobObject(job, process)
}
