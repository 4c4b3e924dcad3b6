package node

import (
	"fmt"
	"io"
	"sync"

	"fsbus/netx"
)

// bulk lets one body at a time be in memory of those that are so large that they
// lie on disk.
type bulk struct{ mu sync.Mutex }

// whole returns a complete body in memory. done lets go of it.
func (k *bulk) whole(b *netx.Body, size int64) (body []byte, done func(), err error) {
	if body, ok := b.Bytes(); ok {
		return body, func() {}, nil
	}
	k.mu.Lock()
	body, err = readBody(b, size)
	return body, k.mu.Unlock, err
}

// readBody reads a complete body into memory.
func readBody(b *netx.Body, size int64) ([]byte, error) {
	buf := make([]byte, size)
	r := b.Reader()
	defer r.Close()
	if _, err := io.ReadFull(r, buf); err != nil {
		return nil, fmt.Errorf("read a body of %d bytes: %w", size, err)
	}
	return buf, nil
}
