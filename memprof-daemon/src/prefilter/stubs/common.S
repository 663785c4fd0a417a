# What the stubs of all functions of an image share. Part of the text of stubs.rs, which
# gives the constants in braces and says what the stubs promise.
#
# Values that differ between images are patched in: `memprof_patch` notes which and
# where. The numbers that stand for them have the width that is needed.

.macro memprof_patch kind, back
.Lmemprof_patch\@:
    .pushsection .rodata.memprof_stubs_patches,"a",@progbits
    .long .Lmemprof_patch\@ - \back - memprof_stubs_start
    .long \kind
    .popsection
.endm

# \reg = address of the shared part's header.
.macro memprof_header reg
    movabs $0x1122334455667788, \reg
    memprof_patch {HEADER_ADDRESS}, 8
.endm

# \offset = home shard of this thread, as a distance from the first shard.
# Flags are changed.
.macro memprof_home offset, offset32
    mov %fs:0, \offset                  # the thread pointer, which points at itself
    imul ${SHARD_HASH}, \offset, \offset
    shr $32, \offset
    and $0x7fffffff, \offset32
    memprof_patch {SHARD_MASK}, 4
.endm

# \reg = address of the first shard.
.macro memprof_shards reg
    movabs $0x1122334455667788, \reg
    memprof_patch {SHARDS_ADDRESS}, 8
.endm

# \index = bucket of the address in \address. Flags are changed.
.macro memprof_bucket address, index, index32
    imul ${BUCKET_HASH}, \address, \index
    shr $32, \index
    and $0x7fffffff, \index32
    memprof_patch {BUCKET_MASK}, 4
.endm

# \reg = address of the first occupancy byte.
.macro memprof_occupancy reg
    movabs $0x1122334455667788, \reg
    memprof_patch {OCCUPANCY_ADDRESS}, 8
.endm

# A place for a uprobe: one byte, which the kernel emulates. Five bytes that newer
# kernels make a call of would need a trampoline in the target, which stays behind.
.macro memprof_site kind
    memprof_patch \kind, 0
    nop
.endm

.pushsection .rodata.memprof_stubs_patches,"a",@progbits
.balign 4
.globl memprof_stubs_patches_start
.hidden memprof_stubs_patches_start
memprof_stubs_patches_start:
.popsection

.pushsection .rodata.memprof_stubs,"a",@progbits
.balign 64
.globl memprof_stubs_start
.hidden memprof_stubs_start
memprof_stubs_start:

# Begins to follow a call, or not.
#
# in    %rax      bytes asked for
#       8(%rsp)   the frame (SiteFrame): function, flags, out_pointer, old_pointer are set
# out   carry     follow it: call the real function, then memprof_stub_exit
#       %rax      undefined
# All other registers are preserved. Uses 64 bytes of stack and what calls here use.
.balign 64, 0xcc
memprof_stub_enter:
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %r8
    push %r9
    # 56(%rsp): the frame, from here on.
    mov %rax, 56+{FRAME_SIZE}(%rsp)
    xor %eax, %eax
    mov %rax, 56+{FRAME_INTERVAL}(%rsp)
    mov %rax, 56+{FRAME_ADDRESS}(%rsp)
    mov %rax, 56+{FRAME_SHARD}(%rsp)
    # A forked child's private part is zero: it is none of ours.
    movabs $0x1122334455667788, %rdx
    memprof_patch {ENABLED_ADDRESS}, 8
    cmpq $0, (%rdx)
    je 7f
    call memprof_stub_find_shard        # %rcx = shard or 0, %rdx = thread pointer
    test %rcx, %rcx
    jz 6f
    mov 0x7fffffff(%rcx), %rax          # the outermost call of this thread
    memprof_patch {CALL_DISTANCE}, 4
    cmp %rdx, %rax
    je 1f                               # none
    # This one is inside it if its frame is further down the stack. If not, that call
    # has never returned (longjmp), and this takes its place.
    lea 56(%rsp), %rsi
    cmp %rax, %rsi
    jb .Lmemprof_take
1:  # Counts.
    mov %rcx, 56+{FRAME_SHARD}(%rsp)
    mov 56+{FRAME_SIZE}(%rsp), %rsi     # %rsi = size
    lzcnt %rsi, %rax
    incq {SHARD_CALLS}(%rcx,%rax,8)
    mov %rsi, %rax
    shr ${IMPOSSIBLE_BITS}, %rax
    jz 2f
    mov $1, %esi                        # no allocator grants it: its bytes are not
    shl ${IMPOSSIBLE_BITS}, %rsi        # counted, and not more of them subtracted
    jmp 3f
2:  add %rsi, {SHARD_BYTES_ASKED}(%rcx)
    cmp $1, %rsi
    adc $0, %rsi                        # 0 bytes are sampled like 1
3:  cmpq $0, 56+{FRAME_OLD}(%rsp)
    je 3f
    incq {SHARD_FREES}(%rcx)
3:  # Decides. %rsi = bytes, 1 to 2^47. The upper half of the countdown tells a redraw.
    cmpl ${REDRAW_LIMIT_UPPER}, 4+{SHARD_COUNTDOWN}(%rcx)
    jg 3f
    call memprof_stub_take_gap
3:  sub %rsi, {SHARD_COUNTDOWN}(%rcx)
    jg 3f
    mov {SHARD_INTERVAL}(%rcx), %rax    # of the gap that ends here
    mov %rax, 56+{FRAME_INTERVAL}(%rsp)
    orl ${FRAME_SAMPLED}, 56+{FRAME_FLAGS}(%rsp)
    call memprof_stub_take_gap
3:  testl ${FRAME_SAMPLED}+{FRAME_NESTS}, 56+{FRAME_FLAGS}(%rsp)
    jz 7f                               # an unsampled malloc: it calls nobody
    lea 56(%rsp), %rax
    mov %rax, 0x7fffffff(%rcx)          # from here on, calls of this thread are inside
    memprof_patch {CALL_DISTANCE}, 4
.Lmemprof_take:
    # realloc: the old block leaves the set now, since another thread may be given its
    # address before the call returns. Inside another call or without a shard, too.
    mov 56+{FRAME_OLD}(%rsp), %rdi
    test %rdi, %rdi
    jz 5f
    call memprof_stub_set_remove
    jnc 5f
    orl ${FRAME_TAKEN}, 56+{FRAME_FLAGS}(%rsp)
    testl ${FRAME_UNMARKED}, 56+{FRAME_FLAGS}(%rsp)
    jz 4f
    memprof_header %rsi                 # followed, and no shard says so
    lock incq {HEADER_UNMARKED}(%rsi)
4:  memprof_site {SITE_TAKE}            # %rdi = the old block
    jmp 8f
5:  cmpq $0, 56+{FRAME_SHARD}(%rsp)
    jne 8f                              # it is the outermost call
7:  clc
    jmp 9f
6:  memprof_header %rsi
    lock incq {HEADER_UNSHARDED}(%rsi)
    orl ${FRAME_UNMARKED}, 56+{FRAME_FLAGS}(%rsp)
    jmp .Lmemprof_take
8:  stc
9:  pop %r9                             # pops leave the carry as it is
    pop %r8
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    ret

# Ends a call that memprof_stub_enter has said to follow.
#
# in    8(%rsp)   the frame
#       %rax      what the real function has returned
# All registers are preserved: they are as the real function has left them. Uses 72 bytes
# of stack and what calls here use.
.balign 64, 0xcc
memprof_stub_exit:
    push %rax
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %r8
    push %r9
    # {SITE_FRAME_OFFSET}(%rsp): the frame, from here on.
    # A signal handler may have forked inside the real function: then it was the parent
    # that has begun the call.
    movabs $0x1122334455667788, %rdx
    memprof_patch {ENABLED_ADDRESS}, 8
    cmpq $0, (%rdx)
    je 5f
    testl ${FRAME_STORES}+{FRAME_IN_PLACE}, {SITE_FRAME_OFFSET}+{FRAME_FLAGS}(%rsp)
    jz 1f
    testl ${FRAME_STORES}, {SITE_FRAME_OFFSET}+{FRAME_FLAGS}(%rsp)
    jz 6f
    test %eax, %eax                     # an int: the upper half is anything
    mov $0, %eax                        # leaves the flags as they are
    jnz 1f
    mov {SITE_FRAME_OFFSET}+{FRAME_OUT}(%rsp), %rax
    mov (%rax), %rax
    jmp 1f
6:  cmp {SITE_FRAME_OFFSET}+{FRAME_SIZE}(%rsp), %rax  # xallocx: the size it has now
    mov $0, %eax
    jb 1f
    mov {SITE_FRAME_OFFSET}+{FRAME_OLD}(%rsp), %rax
1:  mov %rax, {SITE_FRAME_OFFSET}+{FRAME_ADDRESS}(%rsp)  # 0: it has failed
    mov {SITE_FRAME_OFFSET}+{FRAME_SHARD}(%rsp), %rcx    # %rcx = shard; 0: not the outermost call
    mov {SITE_FRAME_OFFSET}+{FRAME_OLD}(%rsp), %rdi
    test %rdi, %rdi
    jz 3f
    test %rax, %rax
    jnz 3f
    cmpq $0, {SITE_FRAME_OFFSET}+{FRAME_SIZE}(%rsp)
    je 3f                               # realloc(p, 0) has freed p
    testl ${FRAME_GIVES_UP}, {SITE_FRAME_OFFSET}+{FRAME_FLAGS}(%rsp)
    jnz 3f                              # so has reallocf
    test %rcx, %rcx
    jz 2f
    decq {SHARD_FREES}(%rcx)            # the old block is as it was
2:  testl ${FRAME_TAKEN}, {SITE_FRAME_OFFSET}+{FRAME_FLAGS}(%rsp)
    jz 3f
    call memprof_stub_set_insert
    memprof_site {SITE_RESTORE}         # frame.old_pointer
3:  testl ${FRAME_SAMPLED}, {SITE_FRAME_OFFSET}+{FRAME_FLAGS}(%rsp)
    jz 4f
    mov {SITE_FRAME_OFFSET}+{FRAME_ADDRESS}(%rsp), %rdi
    test %rdi, %rdi
    jz 4f
    call memprof_stub_set_insert        # before the address is known to anybody
    # The callee-saved registers are the caller's.
    memprof_site {SITE_ALLOC}           # frame: all of it
4:  test %rcx, %rcx
    jz 7f
    lea {SITE_FRAME_OFFSET}(%rsp), %rdx
    cmp %rdx, 0x7fffffff(%rcx)          # not if a later call took its place
    memprof_patch {CALL_DISTANCE}, 4
    jne 5f
    mov %fs:0, %rdx
    mov %rdx, 0x7fffffff(%rcx)          # in no call any more
    memprof_patch {CALL_DISTANCE}, 4
5:  pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rax
    ret
7:  testl ${FRAME_UNMARKED}, {SITE_FRAME_OFFSET}+{FRAME_FLAGS}(%rsp)
    jz 5b                               # it is inside another call
    memprof_header %rdx
    lock decq {HEADER_UNMARKED}(%rdx)
    jmp 5b

# A free whose thread is not at home in its shard, or is inside another call.
#
# in    %rdi      address, not 0
# All registers are preserved.
.balign 64, 0xcc
memprof_stub_free_slow:
    push %rax
    push %rcx
    push %rdx
    push %rsi
    push %r8
    push %r9
    movabs $0x1122334455667788, %rdx
    memprof_patch {ENABLED_ADDRESS}, 8
    cmpq $0, (%rdx)
    je 9f                               # a forked child
    call memprof_stub_find_shard        # %rcx = shard or 0, %rdx = thread pointer
    test %rcx, %rcx
    jz 6f
    mov 0x7fffffff(%rcx), %rax          # the outermost call of this thread
    memprof_patch {CALL_DISTANCE}, 4
    cmp %rdx, %rax
    je 1f
    # %rsp is where a frame of this call would be: the same distance from its return
    # address, 48 bytes pushed and one return address.
    cmp %rax, %rsp
    jb 2f                               # inside it: no call of the program's
1:  incq {SHARD_FREES}(%rcx)
    jmp 2f
6:  memprof_header %rsi
    lock incq {HEADER_UNSHARDED}(%rsi)
    jmp 2f

# A free of an address whose bucket is not empty.
#
# in    %rdi      address, not 0
# All registers are preserved.
memprof_stub_free_occupied:
    push %rax
    push %rcx
    push %rdx
    push %rsi
    push %r8
    push %r9
2:  call memprof_stub_set_remove
    jnc 9f
    memprof_site {SITE_FREE}            # %rdi = the block
9:  pop %r9
    pop %r8
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rax
    ret

# The shard of this thread; takes one if it has none.
#
# out   %rcx      its address; 0 if there is none to take
#       %rdx      the thread pointer
# Clobbers %rax, %rsi, %r8, %r9.
#
# The thread's own is found before the first that never had an owner: a shard that has had
# one does not become such again. The daemon gives back those of ended threads
# (OWNER_GONE); of these the first is taken, if the thread has none further on.
#
# A signal handler may take one meanwhile. If it is the one that is about to be taken, the
# exchange fails. If it is another, since one was given back at that moment, the thread has
# two. So it looks again: the first is its shard, and the other lies idle until it ends.
.balign 64, 0xcc
memprof_stub_find_shard:
    mov %fs:0, %rdx
1:  memprof_home %r8, %r8d
    mov ${SHARD_PROBES}, %r9d           # %r9 = how many are still to be tried
    xor %esi, %esi                      # %rsi = the first that was given back, or 0
2:  memprof_shards %rcx
    add %r8, %rcx
    mov 0x7fffffff(%rcx), %rax
    memprof_patch {OWNER_DISTANCE}, 4
    cmp %rdx, %rax
    je 9f
    cmp ${OWNER_GONE}, %rax
    jb 4f                               # 0: nobody's yet
    jne 3f                              # another thread's
    test %rsi, %rsi
    cmovz %rcx, %rsi
3:  add ${SHARD_BYTES}, %r8d
    and $0x7fffffff, %r8d
    memprof_patch {SHARD_MASK}, 4
    dec %r9d
    jnz 2b
    mov %rsi, %rcx
    test %rcx, %rcx
    jz 9f
4:  test %rsi, %rsi
    cmovnz %rsi, %rcx                   # %rcx = the one to take
    xor %eax, %eax
    cmp %rsi, %rcx
    sete %al                            # %rax = its owner so far: OWNER_GONE, or 0
    lock cmpxchg %rdx, 0x7fffffff(%rcx)
    memprof_patch {OWNER_DISTANCE}, 4
    jne 1b
    movabs ${REDRAW}, %rax
    mov %rax, {SHARD_COUNTDOWN}(%rcx)
    mov %rdx, 0x7fffffff(%rcx)          # in no call
    memprof_patch {CALL_DISTANCE}, 4
    jmp 1b
9:  ret

# Gives the shard its next gap.
#
# in    %rcx      shard
# Clobbers %rax, %rdx, %rdi, %r8, %r9.
.balign 64, 0xcc
memprof_stub_take_gap:
    memprof_header %r8
    # First: see HEADER_GENERATION.
    mov {HEADER_GENERATION}(%r8), %rax
    mov %rax, {SHARD_GENERATION}(%rcx)
1:  mov {HEADER_RING_HEAD}(%r8), %rax
    cmp {HEADER_RING_TAIL}(%r8), %rax
    je 2f
    mov %eax, %r9d
    and ${RING_ENTRIES}-1, %r9d
    shl ${RING_ENTRY_SHIFT}, %r9d
    mov {HEADER_BYTES}(%r8,%r9), %rdx   # %rdx = gap
    mov {HEADER_BYTES}+8(%r8,%r9), %rdi # %rdi = interval
    # The daemon does not overwrite what is between head and tail, so if the head is
    # still the same, they are a pair.
    lea 1(%rax), %r9
    lock cmpxchg %r9, {HEADER_RING_HEAD}(%r8)
    jne 1b
    jmp 4f
2:  xor %edi, %edi                      # interval 0: it is no gap
    xor %edx, %edx
    lock decq {HEADER_CREDIT}(%r8)
    jns 4f                              # gap 0: BPF decides on the next call
    lock incq {HEADER_STARVED}(%r8)
    movabs ${ASLEEP}, %rdx
4:  mov %rdi, {SHARD_INTERVAL}(%rcx)
    mov %rdx, {SHARD_COUNTDOWN}(%rcx)
    ret

# Puts an address into the sampled set.
#
# in    %rdi      address, not 0
# Clobbers %rax, %rdx, %r8, %r9.
.balign 64, 0xcc
memprof_stub_set_insert:
    memprof_bucket %rdi, %rax, %eax
    memprof_occupancy %r8
    add %rax, %r8                       # %r8 = the bucket's occupancy byte
    shl ${BUCKET_SHIFT}, %rax
    movabs $0x1122334455667788, %rdx
    memprof_patch {BUCKETS_ADDRESS}, 8
    add %rax, %rdx
    add ${BUCKET_BYTES}, %rdx           # %rdx = the bucket's end
    lock incb (%r8)                     # before it is in: never too low
    mov $-{BUCKET_BYTES}, %r9
1:  cmp %rdi, (%rdx,%r9)
    je 4f                               # there already
    add $8, %r9
    jnz 1b
2:  mov $-{BUCKET_BYTES}, %r9
3:  xor %eax, %eax
    cmp (%rdx,%r9), %rax
    jne 5f
    lock cmpxchg %rdi, (%rdx,%r9)
    jne 5f                              # another thread has taken the place
    ret
5:  add $8, %r9
    jnz 3b
    lock orb ${OCCUPANCY_OVERFLOWED}, (%r8)
4:  lock decb (%r8)
    ret

# Takes an address out of the sampled set.
#
# in    %rdi      address, not 0
# out   carry     it was in, or its bucket has overflowed and BPF must be asked
# Clobbers %rax, %rdx, %r8, %r9.
.balign 64, 0xcc
memprof_stub_set_remove:
    memprof_bucket %rdi, %rax, %eax
    memprof_occupancy %r8
    add %rax, %r8                       # %r8 = the bucket's occupancy byte
    cmpb $0, (%r8)
    je 8f
    shl ${BUCKET_SHIFT}, %rax
    movabs $0x1122334455667788, %rdx
    memprof_patch {BUCKETS_ADDRESS}, 8
    add %rax, %rdx
    add ${BUCKET_BYTES}, %rdx           # %rdx = the bucket's end
    mov $-{BUCKET_BYTES}, %r9
1:  cmp %rdi, (%rdx,%r9)
    je 2f
    add $8, %r9
    jnz 1b
3:  cmpb $0, (%r8)
    js 9f
8:  clc
    ret
2:  add %r9, %rdx                       # %rdx = its slot
    mov %rdi, %rax
    xor %r9d, %r9d
    lock cmpxchg %r9, (%rdx)
    jne 3b                              # another thread has taken it: a double free
    lock decb (%r8)
9:  stc
    ret
.popsection
