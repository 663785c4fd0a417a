// Allocates both in Go and by C's malloc.
package main

// #include <stdlib.h>
// static void *cHere(long size) { return malloc(size); }
import "C"

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"runtime/pprof"
	"unsafe"
)

var (
	kept  [][]byte
	owned []unsafe.Pointer
)

//go:noinline
func goHere(count, size int) {
	for i := 0; i < count; i++ {
		kept = append(kept, make([]byte, size))
	}
}

func main() {
	runtime.MemProfileRate = 1
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		goHere(100, 100000)
		for i := 0; i < 100; i++ {
			owned = append(owned, C.cHere(1000))
		}
		runtime.GC()
		runtime.GC()
		fmt.Println("done")
	}
	// What keeps profiling in the program.
	if len(os.Args) > 1 {
		pprof.Lookup("heap").WriteTo(os.Stdout, 0)
	}
}
