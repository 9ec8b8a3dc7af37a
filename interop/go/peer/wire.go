package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"context"
)

// Messages are written by hand: a number, a length, the content. Nothing here depends on code made from proto/.

type raw []byte

// codec hands messages through as they are. It calls itself proto, as everybody does.
type codec struct{}

func (codec) Marshal(v interface{}) ([]byte, error) {
	switch m := v.(type) {
	case raw:
		return m, nil
	case *raw:
		return *m, nil
	}
	return nil, fmt.Errorf("%T is no raw message", v)
}

func (codec) Unmarshal(data []byte, v interface{}) error {
	m, ok := v.(*raw)
	if !ok {
		return fmt.Errorf("%T is no raw message", v)
	}
	*m = append(raw(nil), data...)
	return nil
}

func (codec) Name() string   { return "proto" }
func (codec) String() string { return "proto" }

func varint(n uint64) raw {
	var out raw
	for n >= 0x80 {
		out = append(out, byte(n)|0x80)
		n >>= 7
	}
	return append(out, byte(n))
}

func number(field int, value uint64) raw {
	return append(varint(uint64(field)<<3), varint(value)...)
}

func text(field int, content string) raw { return bytesOf(field, raw(content)) }

func bytesOf(field int, parts ...raw) raw {
	var content raw
	for _, part := range parts {
		content = append(content, part...)
	}
	out := append(varint(uint64(field)<<3|2), varint(uint64(len(content)))...)
	return append(out, content...)
}

func join(parts ...raw) raw {
	var out raw
	for _, part := range parts {
		out = append(out, part...)
	}
	return out
}

var errMalformed = errors.New("malformed message")

// value is the last content of a field: the bytes of one with a length, or a number as its varint.
func value(message raw, field int) (raw, error) {
	var found raw
	for len(message) > 0 {
		key, n := readVarint(message)
		if n == 0 {
			return nil, errMalformed
		}
		message = message[n:]
		size := uint64(0)
		switch key & 7 {
		case 0:
			_, n := readVarint(message)
			size = uint64(n)
		case 1:
			size = 8
		case 5:
			size = 4
		case 2:
			length, n := readVarint(message)
			if n == 0 {
				return nil, errMalformed
			}
			message, size = message[n:], length
		default:
			return nil, errMalformed
		}
		if size > uint64(len(message)) || (key&7 == 0 && size == 0) {
			return nil, errMalformed
		}
		if int(key>>3) == field {
			found = message[:size]
		}
		message = message[size:]
	}
	return found, nil
}

func readVarint(b raw) (uint64, int) {
	var value uint64
	for i := 0; i < len(b) && i < 10; i++ {
		value |= uint64(b[i]&0x7f) << (7 * uint(i))
		if b[i] < 0x80 {
			return value, i + 1
		}
	}
	return 0, 0
}

func numberOf(message raw, field int) uint64 {
	found, err := value(message, field)
	if err != nil {
		return 0
	}
	n, _ := readVarint(found)
	return n
}

func repository(storage, path string) raw {
	return join(text(2, storage), text(3, path), text(6, "project-1"))
}

// sign is the credential of every call.
type sign struct{ secret string }

func (s sign) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	now := strconv.FormatInt(time.Now().Unix(), 10)
	mac := hmac.New(sha256.New, []byte(s.secret))
	mac.Write([]byte(now))
	return map[string]string{"authorization": "Bearer v2." + hex.EncodeToString(mac.Sum(nil)) + "." + now}, nil
}

func (sign) RequireTransportSecurity() bool { return false }

// signed is what a node wants of a router.
func signed(secret, header string) bool {
	parts := strings.SplitN(strings.TrimPrefix(header, "Bearer "), ".", 3)
	if len(parts) != 3 || parts[0] != "v2" {
		return false
	}
	at, err := strconv.ParseInt(parts[2], 10, 64)
	if err != nil || time.Since(time.Unix(at, 0)) > 30*time.Second || time.Until(time.Unix(at, 0)) > 30*time.Second {
		return false
	}
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(parts[2]))
	given, err := hex.DecodeString(parts[1])
	return err == nil && hmac.Equal(given, mac.Sum(nil))
}
