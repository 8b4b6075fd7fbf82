// The data path of a backup provider: each distinct block is stored once, named by its SHA-256. The
// arguments and the files are those of store.py.
package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

const blockSize = 65536

type header struct {
	Kind           [8]byte
	Offset, Length uint64
	Digest         [32]byte
}

type frame struct {
	header
	kind string
	data []byte
}

// readFrames calls each for every frame, and returns an error unless the stream is complete.
func readFrames(stream io.Reader, each func(frame) error) error {
	headers := sha256.New()
	var count, total uint64
	first := true
	for {
		var f frame
		err := binary.Read(stream, binary.BigEndian, &f.header)
		if err != nil {
			return errors.New("the stream was cut")
		}
		f.kind = string(bytes.TrimRight(f.Kind[:], "\x00"))
		if f.kind == "end" {
			if first || f.Offset != count || f.Length != total || !bytes.Equal(f.Digest[:], headers.Sum(nil)) {
				return errors.New("the stream is not complete")
			}
			return nil
		}
		binary.Write(headers, binary.BigEndian, f.header)
		switch f.kind {
		case "full", "part":
		case "data", "zero":
			if f.Length > blockSize {
				return fmt.Errorf("a block of %d bytes", f.Length)
			}
			count, total = count+1, total+f.Length
		default:
			return fmt.Errorf("a frame of an unknown kind: %q", f.kind)
		}
		if first != (f.kind == "full" || f.kind == "part") {
			return fmt.Errorf("a frame of kind %q in the wrong place", f.kind)
		}
		first = false
		if f.kind == "data" {
			f.data = make([]byte, f.Length)
			if _, err := io.ReadFull(stream, f.data); err != nil {
				return errors.New("the stream was cut")
			}
			if sha256.Sum256(f.data) != f.Digest {
				return fmt.Errorf("the block at %d is not what was sent", f.Offset)
			}
		}
		if err := each(f); err != nil {
			return err
		}
	}
}

func blockFile(store string, digest []byte) string {
	name := hex.EncodeToString(digest)
	return filepath.Join(store, "blocks", name[:2], name)
}

// writeDurably gives the file its name only when its data is on disk.
func writeDurably(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		return err
	}
	part := fmt.Sprintf("%s.%d.part", path, os.Getpid())
	file, err := os.Create(part)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	return os.Rename(part, path)
}

func readIndex(path string) (uint64, []byte, error) {
	data, err := os.ReadFile(path)
	if err == nil && len(data) < 8 {
		err = fmt.Errorf("%s is no index", path)
	}
	if err != nil {
		return 0, nil, err
	}
	return binary.BigEndian.Uint64(data), data[8:], nil
}

func storeStream(stream io.Reader, store, base string) ([]byte, error) {
	var size uint64
	var index []byte
	err := readFrames(stream, func(f frame) error {
		if f.kind == "full" || f.kind == "part" {
			if index != nil || f.Offset != 1 {
				return errors.New("not a stream of version 1")
			}
			size, index = f.Length, make([]byte, 32*((f.Length+blockSize-1)/blockSize))
			if f.kind == "part" {
				baseSize, content, err := readIndex(base)
				if err == nil && baseSize != size {
					err = errors.New("the base has another size")
				}
				index = content
				return err
			}
			return nil
		}
		at := f.Offset / blockSize * 32
		if at+32 > uint64(len(index)) {
			return errors.New("a block behind the end")
		}
		digest := f.Digest[:]
		if f.kind == "zero" {
			copy(index[at:], make([]byte, 32))
			return nil
		}
		copy(index[at:], digest)
		path := blockFile(store, digest)
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		return writeDurably(path, f.data)
	})
	return append(binary.BigEndian.AppendUint64(nil, size), index...), err
}

func backup(store, index, base, device, volume, limit string, command []string) error {
	arguments := append(command[1:], "copy", "-", "--device", device, "--volume", volume)
	if limit != "" {
		arguments = append(arguments, "--bandwidth-limit", limit)
	}
	process := exec.Command(command[0], arguments...)
	process.Stderr = os.Stderr
	pipe, err := process.StdoutPipe()
	if err != nil {
		return err
	}
	if err := process.Start(); err != nil {
		return err
	}
	content, err := storeStream(bufio.NewReaderSize(pipe, 1<<20), store, base)
	pipe.Close()
	if waited := process.Wait(); waited != nil {
		err = fmt.Errorf("the copy failed: %w", waited)
	}
	if err != nil {
		return err
	}
	return writeDurably(index, content)
}

func restore(store, index, image string) error {
	size, digests, err := readIndex(index)
	if err != nil {
		return err
	}
	file, err := os.Create(image)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := file.Truncate(int64(size)); err != nil {
		return err
	}
	for at := 0; at+32 <= len(digests); at += 32 {
		digest := digests[at : at+32]
		if bytes.Equal(digest, make([]byte, 32)) {
			continue
		}
		data, err := os.ReadFile(blockFile(store, digest))
		if err != nil {
			return err
		}
		if sum := sha256.Sum256(data); !bytes.Equal(sum[:], digest) {
			return fmt.Errorf("the block at %d is damaged", at/32*blockSize)
		}
		if _, err := file.WriteAt(data, int64(at/32*blockSize)); err != nil {
			return err
		}
	}
	return nil
}

func main() {
	syscall.Umask(0o077) // blocks are as confidential as their disk
	err := errors.New("call it as store.py")
	if a := os.Args; len(a) > 8 && a[1] == "backup" {
		err = backup(a[2], a[3], a[4], a[5], a[6], a[7], a[8:])
	} else if len(a) == 5 && a[1] == "restore" {
		err = restore(a[2], a[3], a[4])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "store:", err)
		os.Exit(1)
	}
}
