// Allocates in known ways, and writes its own heap profile: what memprof reads from outside has
// to be the same.
//
//	heap PROFILE RATE [LAST]
//
// For each line on stdin it allocates, and writes PROFILE.0, PROFILE.1, ... RATE is what it
// sets runtime.MemProfileRate to, and LAST is that when it has written one.
package main

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
)

type pair[T any] struct{ first, second *T }

type record struct {
	name   string
	values []int64
	next   *record
}

var (
	kept    [][]byte
	records *record
	names   = map[string]*pair[int64]{}
	sink    []byte
)

//go:noinline
func keepHere(count, size int) {
	for i := 0; i < count; i++ {
		kept = append(kept, inlinedHere(size))
	}
}

func inlinedHere(size int) []byte { return wrappedHere(size) }

func wrappedHere(size int) []byte { return make([]byte, size) }

//go:noinline
func churnHere(count, size int) {
	for i := 0; i < count; i++ {
		sink = make([]byte, size)
	}
	sink = nil
}

//go:noinline
func (r *record) methodHere(count int) {
	for i := 0; i < count; i++ {
		records = &record{strconv.Itoa(i), make([]int64, 4), records}
	}
}

//go:noinline
func pairHere[T any](value T) *pair[T] {
	first, second := value, value
	return &pair[T]{&first, &second}
}

// More frames than Go 1.19 keeps.
//
//go:noinline
func deepHere(depth int) {
	if depth == 0 {
		keepHere(10, 3000)
		return
	}
	deepHere(depth - 1)
}

func round(number int) {
	keepHere(200, 50000)
	churnHere(20000, 1000)
	records.methodHere(5000)
	deepHere(40)
	for i := 0; i < 2000; i++ {
		names[fmt.Sprint("name", number, i)] = pairHere(int64(i))
	}
	done := make(chan bool)
	go func() {
		keepHere(20, 9000)
		done <- true
	}()
	<-done
	// Of what this round has kept, some goes.
	kept = kept[len(kept)/4:]
}

func setRate(argument int) {
	if len(os.Args) > argument {
		runtime.MemProfileRate, _ = strconv.Atoi(os.Args[argument])
	}
}

func main() {
	setRate(2)
	// Collections happen when this program says so.
	debug.SetGCPercent(-1)
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for number := 0; lines.Scan(); number++ {
		round(number)
		// Frees count in the collection after the one that has found them.
		runtime.GC()
		runtime.GC()
		file, err := os.Create(fmt.Sprint(os.Args[1], ".", number))
		if err != nil {
			panic(err)
		}
		if err := pprof.Lookup("heap").WriteTo(file, 0); err != nil {
			panic(err)
		}
		file.Close()
		setRate(3)
		fmt.Println("done")
	}
}
