package main

import (
	"fmt"
	"os"
	"strings"
	"time"
)

// skip is an error that is none: the check cannot be made here.
type skip string

func (s skip) Error() string { return string(s) }

type report struct{ suite string }

func (r report) line(outcome, name, took, detail string) {
	detail = strings.Join(strings.Fields(detail), " ")
	fmt.Println(strings.Join([]string{"check", outcome, r.suite, name, took, detail}, "\t"))
}

// check runs one check; one that panics or takes too long has failed.
func (r report) check(name string, work func() error) bool {
	began := time.Now()
	done := make(chan error, 1)
	go func() {
		defer func() {
			if panicked := recover(); panicked != nil {
				done <- fmt.Errorf("panic: %v", panicked)
			}
		}()
		done <- work()
	}()
	var err error
	select {
	case err = <-done:
	case <-time.After(90 * time.Second):
		err = fmt.Errorf("not within 90 s")
	}
	took := fmt.Sprintf("%.2fs", time.Since(began).Seconds())
	switch why := err.(type) {
	case nil:
		r.line("passed", name, took, "")
	case skip:
		r.line("skipped", name, "", string(why))
	default:
		r.line("failed", name, took, err.Error())
		fmt.Fprintf(os.Stderr, "%s: %s: %v\n", r.suite, name, err)
	}
	return err == nil
}

func expect(what string, seen, expected interface{}) error {
	if fmt.Sprint(seen) != fmt.Sprint(expected) {
		return fmt.Errorf("%s: %v instead of %v", what, seen, expected)
	}
	return nil
}

// first is the first error there is.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
