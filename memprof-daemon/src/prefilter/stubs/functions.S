# The stubs of the functions: each is copied for each function of its kind, and the
# function's first instructions, which go on in the real function, are put at its end.
# So the end of a stub is where the real function begins.
#
# On entry of all: the arguments are in %rdi, %rsi, %rdx, %rcx; 0(%rsp) is the return address,
# and %rsp + 8 a multiple of 16. %rax is nobody's, but for functions that return nothing.

# The frame: 56 bytes below the return address, which is its last word.
.macro memprof_frame flags
    sub $56, %rsp
    movl $0x7fffffff, {FRAME_FUNCTION}(%rsp)
    memprof_patch {FUNCTION}, 4
    movl $\flags, {FRAME_FLAGS}(%rsp)
.endm

# The rest of a stub that follows its call.
#
# %rax = bytes asked for; %rsp = frame, whose function, flags, out_pointer and
# old_pointer are set. Behind it, the real function, with all registers but %rax as on
# entry.
.macro memprof_follow name
    call memprof_stub_enter
    memprof_patch {TO_COMMON}, 4
    jnc 1f
    call memprof_stub_\name\()_end      # %rsp is a multiple of 16
    call memprof_stub_exit              # %rax, %rdx and all others as it left them
    memprof_patch {TO_COMMON}, 4
    add $56, %rsp
    ret
1:  add $56, %rsp
.endm

# %rcx = home shard of this thread, if it is the thread's and the thread is in no call that
# is followed; else \slow. %rax is the thread pointer.
.macro memprof_at_home slow
    memprof_home %rcx, %ecx
    memprof_shards %rax
    add %rax, %rcx                      # %rcx = the home shard
    mov %fs:0, %rax
    cmp %rax, 0x7fffffff(%rcx)          # it is this thread's, which is in no call
    memprof_patch {CALL_DISTANCE}, 4
    jne \slow
.endm

# As memprof_follow, of a call that has been counted and is not sampled, and is followed for
# the calls inside of it alone: it only has the mark.
#
# %rcx = shard; -8(%rsp), -16(%rsp) = %rcx and %rdx on entry. \fails is executed before the
# mark goes, with %rcx = shard, 24(%rsp) = %rdi on entry and what the function has returned
# in %rax.
.macro memprof_follow_unsampled name, fails
    mov -16(%rsp), %rdx
    lea -56(%rsp), %rax                 # where the frame would be
    mov %rdi, -32(%rsp)
    mov %rcx, -24(%rsp)
    mov %rax, 0x7fffffff(%rcx)
    memprof_patch {CALL_DISTANCE}, 4
    mov -8(%rsp), %rcx
    sub $56, %rsp
    call memprof_stub_\name\()_end      # %rsp is a multiple of 16
    mov %rcx, (%rsp)
    mov 32(%rsp), %rcx
    cmp %rsp, 0x7fffffff(%rcx)          # not in a child that was forked meanwhile, nor if a
    memprof_patch {CALL_DISTANCE}, 4    # later call took its place
    jne 1f
    \fails
    mov %rdx, 8(%rsp)
    mov %fs:0, %rdx
    mov %rdx, 0x7fffffff(%rcx)          # in no call any more
    memprof_patch {CALL_DISTANCE}, 4
    mov 8(%rsp), %rdx
1:  mov (%rsp), %rcx
    add $56, %rsp
    ret
.endm

# The old block is as it was, if there is one.
.macro memprof_realloc_fails
    test %rax, %rax
    jnz 2f
    cmpq $1, 24(%rsp)
    adcq $-1, {SHARD_FREES}(%rcx)
2:
.endm

# As memprof_follow, of a function that may throw. Not itself is called, which the unwinder
# would have to come back from through this frame, but its twin: that returns 0 instead. Then
# the function is entered without a frame, and throws, or finds memory after all.
.macro memprof_follow_twin
    call memprof_stub_enter
    memprof_patch {TO_COMMON}, 4
    jnc 1f
    push %rdi
    push %rsi
    push %rdx
    push %rcx
    call .                              # %rsp is a multiple of 16
    memprof_patch {TWIN}, 4
    pop %rcx
    pop %rdx
    pop %rsi
    pop %rdi
    call memprof_stub_exit
    memprof_patch {TO_COMMON}, 4
    test %rax, %rax
    jz 1f
    add $56, %rsp
    ret
1:  add $56, %rsp
.endm

# %rdx:%rax = %rax * \factor, %rax all ones if that is too large; %rdx preserved.
.macro memprof_product factor
    mov %rdx, {FRAME_INTERVAL}(%rsp)    # not in use yet
    mul \factor
    mov {FRAME_INTERVAL}(%rsp), %rdx    # leaves the flags as they are
    jno 1f
    mov $-1, %rax
1:
.endm

.macro memprof_begin name
.balign 64, 0xcc
memprof_stub_\name:
.endm

.macro memprof_entry name
.balign 64, 0xcc
memprof_stub_\name\()_entry:
.endm

.macro memprof_end name
memprof_stub_\name\()_end:
    ud2                                 # not copied
    .pushsection .rodata.memprof_stubs_table,"a",@progbits
    .long memprof_stub_\name - memprof_stubs_start
    .long memprof_stub_\name\()_entry - memprof_stubs_start
    .long memprof_stub_\name\()_end - memprof_stubs_start
    .popsection
.endm

# The order of the table is that of `Template` in stubs.rs.
.pushsection .rodata.memprof_stubs_table,"a",@progbits
.balign 4
.globl memprof_stubs_table
.hidden memprof_stubs_table
memprof_stubs_table:
.popsection

.pushsection .rodata.memprof_stubs,"a",@progbits

# void *malloc(size_t %rdi)
#
# An unsampled call of a thread at home and in no other call: %rcx is kept below the
# stack pointer, where signal handlers do not write (the red zone), %rax is free, and
# the stack pointer does not move. Then the real function, as if nothing had been there.
memprof_begin malloc
.Lmemprof_malloc_sampled:
    add %rdi, {SHARD_COUNTDOWN}(%rcx)   # memprof_stub_enter decides
.Lmemprof_malloc_slow:
    mov -8(%rsp), %rcx
    memprof_frame 0
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rax, {FRAME_OLD}(%rsp)
    mov %rdi, %rax
    memprof_follow malloc
    jmp memprof_stub_malloc_end
memprof_entry malloc
    mov %rcx, -8(%rsp)
    memprof_at_home .Lmemprof_malloc_slow
    lzcnt %rdi, %rax                    # %rax = leading zeros of the size
    jbe .Lmemprof_malloc_slow           # carry: size 0; zero: 2^63 or more
    sub %rdi, {SHARD_COUNTDOWN}(%rcx)
    jle .Lmemprof_malloc_sampled        # or impossible, or to draw anew
    incq {SHARD_CALLS}(%rcx,%rax,8)
    add %rdi, {SHARD_BYTES_ASKED}(%rcx)
    mov -8(%rsp), %rcx
memprof_end malloc

# void free(void *%rdi), also with a size or an alignment behind it
#
# An unsampled block's free, as above, but %rax is kept, too.
memprof_begin free
.Lmemprof_free_slow:
    mov -16(%rsp), %rcx
    mov -8(%rsp), %rax
    call memprof_stub_free_slow
    memprof_patch {TO_COMMON}, 4
    jmp memprof_stub_free_end
.Lmemprof_free_occupied:
    mov -16(%rsp), %rcx
    mov -8(%rsp), %rax
    call memprof_stub_free_occupied
    memprof_patch {TO_COMMON}, 4
    jmp memprof_stub_free_end
memprof_entry free
    test %rdi, %rdi
    jz memprof_stub_free_end            # free(NULL) is none
    mov %rax, -8(%rsp)
    mov %rcx, -16(%rsp)
    memprof_at_home .Lmemprof_free_slow
    incq {SHARD_FREES}(%rcx)
    memprof_bucket %rdi, %rax, %eax     # %rax = bucket
    memprof_occupancy %rcx
    cmpb $0, (%rcx,%rax)
    jne .Lmemprof_free_occupied
    mov -16(%rsp), %rcx
    mov -8(%rsp), %rax
memprof_end free

# void *valloc(size_t %rdi), pvalloc, and malloc where it calls another module's
memprof_begin sized
memprof_entry sized
    memprof_frame {FRAME_NESTS}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rax, {FRAME_OLD}(%rsp)
    mov %rdi, %rax
    memprof_follow sized
memprof_end sized

# void *calloc(size_t %rdi, size_t %rsi)
#
# An unsampled call of a thread at home and in no other call: as of malloc, but followed.
memprof_begin calloc
.Lmemprof_calloc_sampled:
    add %rax, {SHARD_COUNTDOWN}(%rcx)   # memprof_stub_enter decides
.Lmemprof_calloc_slow:
    mov -16(%rsp), %rdx
    mov -8(%rsp), %rcx
    memprof_frame {FRAME_NESTS}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rax, {FRAME_OLD}(%rsp)
    mov %rdi, %rax
    memprof_product %rsi
    memprof_follow calloc
    jmp memprof_stub_calloc_end
memprof_entry calloc
    mov %rcx, -8(%rsp)
    mov %rdx, -16(%rsp)
    memprof_at_home .Lmemprof_calloc_slow
    mov %rdi, %rax
    mul %rsi                            # %rax = bytes asked for
    jo .Lmemprof_calloc_slow
    lzcnt %rax, %rdx
    jbe .Lmemprof_calloc_slow           # carry: size 0; zero: 2^63 or more
    sub %rax, {SHARD_COUNTDOWN}(%rcx)
    jle .Lmemprof_calloc_sampled        # or impossible, or to draw anew
    incq {SHARD_CALLS}(%rcx,%rdx,8)
    add %rax, {SHARD_BYTES_ASKED}(%rcx)
    memprof_follow_unsampled calloc
memprof_end calloc

# void *realloc(void *%rdi, size_t %rsi)
#
# An unsampled call of a thread at home and in no other call, with a block whose bucket is
# empty: as of calloc.
memprof_begin realloc
.Lmemprof_realloc_sampled:
    add %rsi, {SHARD_COUNTDOWN}(%rcx)   # memprof_stub_enter decides
.Lmemprof_realloc_slow:
    mov -16(%rsp), %rdx
    mov -8(%rsp), %rcx
    memprof_frame {FRAME_NESTS}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rdi, {FRAME_OLD}(%rsp)
    mov %rsi, %rax
    memprof_follow realloc
    jmp memprof_stub_realloc_end
memprof_entry realloc
    mov %rcx, -8(%rsp)
    mov %rdx, -16(%rsp)
    memprof_at_home .Lmemprof_realloc_slow
    memprof_bucket %rdi, %rax, %eax     # of NULL, too: then it may be slow, no more
    memprof_occupancy %rdx
    cmpb $0, (%rdx,%rax)
    jne .Lmemprof_realloc_slow
    lzcnt %rsi, %rax
    jbe .Lmemprof_realloc_slow          # as above
    sub %rsi, {SHARD_COUNTDOWN}(%rcx)
    jle .Lmemprof_realloc_sampled
    incq {SHARD_CALLS}(%rcx,%rax,8)
    add %rsi, {SHARD_BYTES_ASKED}(%rcx)
    cmp $1, %rdi                        # carry: there is no old block
    sbbq $-1, {SHARD_FREES}(%rcx)
    memprof_follow_unsampled realloc, memprof_realloc_fails
memprof_end realloc

# void *reallocarray(void *%rdi, size_t %rsi, size_t %rdx)
memprof_begin reallocarray
memprof_entry reallocarray
    memprof_frame {FRAME_NESTS}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rdi, {FRAME_OLD}(%rsp)
    mov %rsi, %rax
    memprof_product %rdx
    memprof_follow reallocarray
memprof_end reallocarray

# int posix_memalign(void **%rdi, size_t %rsi, size_t %rdx)
memprof_begin posix_memalign
memprof_entry posix_memalign
    memprof_frame {FRAME_NESTS}+{FRAME_STORES}
    xor %eax, %eax
    mov %rdi, {FRAME_OUT}(%rsp)
    mov %rax, {FRAME_OLD}(%rsp)
    mov %rdx, %rax
    memprof_follow posix_memalign
memprof_end posix_memalign

# void *aligned_alloc(size_t %rdi, size_t %rsi), memalign, and with a heap in %rdi
memprof_begin aligned
memprof_entry aligned
    memprof_frame {FRAME_NESTS}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rax, {FRAME_OLD}(%rsp)
    mov %rsi, %rax
    memprof_follow aligned
memprof_end aligned

# size_t xallocx(void *%rdi, size_t %rsi, size_t, int)
memprof_begin xallocx
memprof_entry xallocx
    memprof_frame {FRAME_NESTS}+{FRAME_IN_PLACE}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rdi, {FRAME_OLD}(%rsp)
    mov %rsi, %rax
    memprof_follow xallocx
memprof_end xallocx

# void *reallocf(void *%rdi, size_t %rsi)
memprof_begin reallocf
memprof_entry reallocf
    memprof_frame {FRAME_NESTS}+{FRAME_GIVES_UP}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rdi, {FRAME_OLD}(%rsp)
    mov %rsi, %rax
    memprof_follow reallocf
memprof_end reallocf

# void *mi_heap_calloc(mi_heap_t *, size_t %rsi, size_t %rdx)
memprof_begin heap_calloc
memprof_entry heap_calloc
    memprof_frame {FRAME_NESTS}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rax, {FRAME_OLD}(%rsp)
    mov %rsi, %rax
    memprof_product %rdx
    memprof_follow heap_calloc
memprof_end heap_calloc

# void *mi_heap_realloc(mi_heap_t *, void *%rsi, size_t %rdx)
memprof_begin heap_realloc
memprof_entry heap_realloc
    memprof_frame {FRAME_NESTS}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rsi, {FRAME_OLD}(%rsp)
    mov %rdx, %rax
    memprof_follow heap_realloc
memprof_end heap_realloc

# void *mi_heap_reallocn(mi_heap_t *, void *%rsi, size_t %rdx, size_t %rcx)
memprof_begin heap_reallocn
memprof_entry heap_reallocn
    memprof_frame {FRAME_NESTS}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rsi, {FRAME_OLD}(%rsp)
    mov %rdx, %rax
    memprof_product %rcx
    memprof_follow heap_reallocn
memprof_end heap_reallocn

# void *mi_heap_reallocf(mi_heap_t *, void *%rsi, size_t %rdx)
memprof_begin heap_reallocf
memprof_entry heap_reallocf
    memprof_frame {FRAME_NESTS}+{FRAME_GIVES_UP}
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rsi, {FRAME_OLD}(%rsp)
    mov %rdx, %rax
    memprof_follow heap_reallocf
memprof_end heap_reallocf

# void *operator new(size_t %rdi), also with an alignment behind it
#
# An unsampled call of a thread at home and in no other call: as of malloc.
memprof_begin new
.Lmemprof_new_sampled:
    add %rdi, {SHARD_COUNTDOWN}(%rcx)   # memprof_stub_enter decides
.Lmemprof_new_slow:
    mov -8(%rsp), %rcx
    memprof_frame 0
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rax, {FRAME_OLD}(%rsp)
    mov %rdi, %rax
    memprof_follow_twin
    jmp memprof_stub_new_end
memprof_entry new
    mov %rcx, -8(%rsp)
    memprof_at_home .Lmemprof_new_slow
    lzcnt %rdi, %rax                    # %rax = leading zeros of the size
    jbe .Lmemprof_new_slow              # carry: size 0; zero: 2^63 or more
    sub %rdi, {SHARD_COUNTDOWN}(%rcx)
    jle .Lmemprof_new_sampled           # or impossible, or to draw anew
    incq {SHARD_CALLS}(%rcx,%rax,8)
    add %rdi, {SHARD_BYTES_ASKED}(%rcx)
    mov -8(%rsp), %rcx
memprof_end new

# void *mi_new_n(size_t %rdi, size_t %rsi)
memprof_begin new_n
memprof_entry new_n
    memprof_frame 0
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rax, {FRAME_OLD}(%rsp)
    mov %rdi, %rax
    memprof_product %rsi
    memprof_follow_twin
memprof_end new_n

# void *mi_heap_alloc_new(mi_heap_t *, size_t %rsi)
memprof_begin heap_new
memprof_entry heap_new
    memprof_frame 0
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rax, {FRAME_OLD}(%rsp)
    mov %rsi, %rax
    memprof_follow_twin
memprof_end heap_new

# void *mi_heap_alloc_new_n(mi_heap_t *, size_t %rsi, size_t %rdx)
memprof_begin heap_new_n
memprof_entry heap_new_n
    memprof_frame 0
    xor %eax, %eax
    mov %rax, {FRAME_OUT}(%rsp)
    mov %rax, {FRAME_OLD}(%rsp)
    mov %rsi, %rax
    memprof_product %rdx
    memprof_follow_twin
memprof_end heap_new_n

# void free(void *%rdi) with a size or an alignment behind it, which for some blocks is nothing
# but a call of another. Both cannot be told apart from outside, so that one is called for all.
memprof_begin passing
memprof_entry passing
    .byte 0xe9                          # jmp, with 4 bytes of distance whatever it is
    .long 0
    memprof_patch {TWIN}, 4
memprof_end passing

.balign 64, 0xcc
.globl memprof_stubs_end
.hidden memprof_stubs_end
memprof_stubs_end:
.popsection

.pushsection .rodata.memprof_stubs_patches,"a",@progbits
.globl memprof_stubs_patches_end
.hidden memprof_stubs_patches_end
memprof_stubs_patches_end:
.popsection
