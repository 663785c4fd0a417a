// Allocates, and becomes another program.
//
//	heap_exec PROGRAM ARGS...
//
// For each line on stdin it allocates, but for the line "exec": then it becomes PROGRAM.
package main

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"runtime/pprof"
	"syscall"
)

var sink []byte

//go:noinline
func churnHere(count, size int) {
	for i := 0; i < count; i++ {
		sink = make([]byte, size)
	}
	sink = nil
}

func main() {
	runtime.MemProfileRate = 1
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if lines.Text() == "exec" {
			panic(syscall.Exec(os.Args[1], os.Args[1:], os.Environ()))
		}
		churnHere(1000, 1000)
		runtime.GC()
		runtime.GC()
		fmt.Println("done")
	}
	// What keeps profiling in the program.
	if len(os.Args) == 1 {
		pprof.Lookup("heap").WriteTo(os.Stdout, 0)
	}
}
