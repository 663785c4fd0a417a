// Allocates, and has nothing that reads a profile: the linker leaves profiling out.
package main

import "os"

var kept [][]byte

func main() {
	line := make([]byte, 100)
	os.Stdout.WriteString("ready\n")
	for {
		if count, _ := os.Stdin.Read(line); count == 0 {
			return
		}
		for i := 0; i < 100; i++ {
			kept = append(kept, make([]byte, 100000))
		}
		os.Stdout.WriteString("done\n")
	}
}
