package openssh

import (
	"io"
	"os"
)

func folderOf(int) string { return "culvert-ssh-*" }

func sweep() {}

func controlling() *os.File { return nil }

func stdin(*os.File) io.Reader { return nil }
