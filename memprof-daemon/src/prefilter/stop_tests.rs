use super::*;
use crate::{
    prefilter::{
        halt::{runs_no_code, threads_of},
        inject::InjectError,
        testing::{Target, soon, trace},
        within,
    },
    process::info::ProcessError,
};
use nix::sys::signal::Signal;
use std::{collections::HashSet, os::unix::process::ExitStatusExt as _, thread};

const PAGE: u64 = 4096;

/// Stops `pid` and makes `calls` calls in it; how long it stood still.
fn stop_and_call(pid: u32, calls: u32) -> Duration {
    trace(|tracer| {
        let mut stopped = Stopped::all(tracer, pid, soon()).unwrap();
        if calls > 0 {
            stopped
                .inject(|target| {
                    for _ in 0..calls {
                        assert_eq!(target.call(libc::SYS_getpid, [0; 6])?, u64::from(pid));
                    }
                    Ok(())
                })
                .unwrap();
        }
        stopped.release().unwrap()
    })
}

/// Check that calls that wait return, after stops and calls made in their thread, what
/// they would have: nothing before its time, and no EINTR.
#[test]
fn waiting_calls_go_on() {
    for kind in [
        "read",
        "poll",
        "poll-timeout",
        "ppoll",
        "select",
        "futex",
        "futex-timeout",
        "nanosleep",
        "clock_nanosleep",
        "epoll_wait",
        "epoll-timeout",
        "epoll_pwait",
        "epoll_pwait2",
        "pause",
        "sigsuspend",
        "sigtimedwait",
        "accept",
        "accept-timeout",
        "recv",
        "recv-timeout",
        "wait4",
        "semop",
        "msgrcv",
        "io_getevents",
    ] {
        let target = Target::interrupted(kind);
        for calls in [0, 0, 1, 5] {
            stop_and_call(target.pid(), calls);
            let waits = format!("waits in {kind} again after {calls} calls");
            target.until(&waits, |target| target.state() == 'S');
        }
        let (status, said) = target.finish();
        assert!(status.success(), "{kind}: {status} {said}");
    }
}

/// Check that a signal during a stop ends a call as it does without one, also one that is
/// otherwise set back: a handler has run.
#[test]
fn signals_end_calls_still() {
    for (kind, is_right) in [
        ("epoll_pwait", true),
        ("sigsuspend", true),
        ("sigtimedwait", true),
    ] {
        let target = Target::interrupted(kind);
        trace(|tracer| {
            let stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
            target.kill(Signal::SIGUSR1);
            stopped.release().unwrap();
        });
        target.until("ends", |target| target.state() == 'Z');
        let (status, said) = target.finish();
        assert_eq!(status.success(), is_right, "{kind}: {status} {said}");
    }
}

/// Check that 1,000 queued signals with values arrive once each, in order, whether sent
/// while the process stands, is being stopped, or calls are made in it.
#[test]
fn signals_arrive_once_and_in_order() {
    let target = Target::hazard(&["signals"]);
    let pid = target.pid();
    let queue = |value: usize| {
        let value = libc::sigval {
            sival_ptr: std::ptr::without_provenance_mut(value),
        };
        // SAFETY: sends a signal with a number; nothing is read or written.
        let sent = unsafe { libc::sigqueue(pid.cast_signed(), libc::SIGRTMIN(), value) };
        assert_eq!(sent, 0);
    };
    trace(|tracer| {
        let mut stopped = Stopped::all(tracer, pid, soon()).unwrap();
        (0..400).for_each(queue);
        stopped
            .inject(|calls| {
                (400..500).for_each(queue);
                calls.call(libc::SYS_getpid, [0; 6])?;
                (500..600).for_each(queue);
                calls.call(libc::SYS_getpid, [0; 6])
            })
            .unwrap();
        stopped.release().unwrap();
    });
    thread::scope(|scope| {
        scope.spawn(|| {
            for value in 600..1000 {
                queue(value);
                thread::sleep(Duration::from_micros(100));
            }
        });
        for _ in 0..100 {
            stop_and_call(pid, 1);
        }
    });
    target.until("has all", |target| target.counter() == 1000);
    target.finish_well();
}

/// Check that registers, vector and floating-point state, red zone, flags, signal mask
/// and alternate stack are as before after 100 stops with calls.
#[test]
fn registers_stay() {
    let target = Target::hazard(&["compute"]);
    for _ in 0..100 {
        stop_and_call(target.pid(), 2);
    }
    target.until_it_works();
    target.finish_well();
}

/// Check that no thread is missed of those that a process makes meanwhile: nothing
/// moves while it stands.
#[test]
fn threads_made_meanwhile() {
    let target = Target::hazard(&["spawners", "8"]);
    for _ in 0..50 {
        target.until_it_works();
        trace(|tracer| {
            let mut stopped = match Stopped::all(tracer, target.pid(), soon()) {
                Ok(stopped) => stopped,
                // A thread that ends has given its thread pointer's memory back.
                Err(StopError::NoThreadPointer { .. }) => return,
                Err(error) => panic!("{error}"),
            };
            let before = target.counter();
            thread::sleep(Duration::from_millis(2));
            assert_eq!(target.counter(), before);
            let seen: HashSet<u32> = stopped.threads().map(|thread| thread.tid).collect();
            for tid in threads_of(target.pid()).unwrap() {
                assert!(seen.contains(&tid) || runs_no_code(tid), "{tid}");
            }
            stopped
                .inject(|calls| calls.call(libc::SYS_getpid, [0; 6]))
                .unwrap();
        });
    }
    target.until_it_works();
    target.finish_well();
}

/// Check how long 200 threads stand still, waiting and running ones, with a search of
/// their stacks and calls made: the least of 20 times, since tests run beside others, is
/// at most 20 ms.
#[test]
fn two_hundred_threads() {
    let target = Target::hazard(&["waiters", "200"]);
    let mut times: Vec<(Duration, Duration)> = (0..20)
        .map(|_| {
            trace(|tracer| {
                let mut stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
                assert_eq!(stopped.threads().count(), 201);
                let all_stand = stopped.elapsed();
                assert!(
                    !stopped
                        .is_anyone_within(std::slice::from_ref(&(1..2)))
                        .unwrap()
                );
                stopped
                    .inject(|calls| calls.call(libc::SYS_getpid, [0; 6]))
                    .unwrap();
                (stopped.release().unwrap(), all_stand)
            })
        })
        .collect();
    times.sort();
    let (median, all_stand) = times[10];
    println!("201 threads stood for {median:?} (median), {all_stand:?} of it until all did");
    println!("at least {:?}, at most {:?}", times[0].0, times[19].0);
    assert!(times[0].0 < Duration::from_millis(20), "{:?}", times[0]);
    target.finish_well();
}

/// Check that a process that a signal has stopped is stopped afterwards, also after calls
/// in it, and goes on with SIGCONT; and that SIGCONT and SIGSTOP meanwhile have their way.
#[test]
fn stopped_by_a_signal() {
    let target = Target::hazard(&["spinners", "2"]);
    let pid = target.pid();
    target.kill(Signal::SIGSTOP);
    target.until("stops", |target| target.state() == 'T');
    for calls in [0, 3] {
        stop_and_call(pid, calls);
        let before = target.counter();
        thread::sleep(Duration::from_millis(20));
        assert_eq!((target.state(), target.counter()), ('T', before));
    }
    target.kill(Signal::SIGCONT);
    target.until_it_works();

    let call_amid = |signal| {
        trace(|tracer| {
            let mut stopped = Stopped::all(tracer, pid, soon()).unwrap();
            stopped
                .inject(|calls| {
                    calls.call(libc::SYS_getpid, [0; 6])?;
                    target.kill(signal);
                    calls.call(libc::SYS_getpid, [0; 6])
                })
                .unwrap();
        });
    };
    call_amid(Signal::SIGSTOP);
    target.until("stops", |target| target.state() == 'T');
    call_amid(Signal::SIGCONT);
    target.until_it_works();
    target.finish_well();
}

/// Check that memory can be mapped in a process that a seccomp filter kills for it, and
/// that the filter is in force again afterwards.
#[test]
fn seccomp_is_suspended() {
    let target = Target::hazard(&["confined"]);
    target.until_it_works();
    trace(|tracer| {
        let mut stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
        let mapped = stopped.inject(|calls| {
            calls.write(b"memprof-prefilter\0")?;
            let name = calls.scratch();
            let fd = calls.call(libc::SYS_memfd_create, [name, 0, 0, 0, 0, 0])?;
            calls.call(libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
            calls.call(libc::SYS_mmap, [0, 4096, 1, flags, u64::MAX, 0])
        });
        let mapped = mapped.unwrap();
        let maps = stopped.maps().unwrap();
        assert!(
            maps.iter()
                .any(|entry| entry.start.0 <= mapped && mapped < entry.end.0)
        );
    });
    target.until_it_works();
    assert!(crate::probe::seccomp::is_confined(target.pid()));
    target.finish_well();
}

/// Check that a failing call is told with its error, and that the thread goes on.
#[test]
fn failing_calls() {
    let target = Target::hazard(&["compute"]);
    trace(|tracer| {
        let mut stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
        let error = stopped.inject(|calls| calls.call(libc::SYS_close, [999, 0, 0, 0, 0, 0]));
        assert!(
            matches!(
                error,
                Err(InjectError::Call {
                    source: Errno::EBADF,
                    ..
                })
            ),
            "{error:?}"
        );
        let error = stopped.inject(|calls| calls.write(&[0; 257]));
        assert!(matches!(error, Err(InjectError::Scratch { bytes: 257 })));
    });
    target.until_it_works();
    target.finish_well();
}

/// Check that a process is stopped however little of the time that is allowed is left: its
/// threads wait for a processor, and are not unstoppable.
#[test]
fn at_the_end_of_the_time() {
    let target = Target::hazard(&["spinners", "20"]);
    for _ in 0..20 {
        trace(|tracer| {
            let stopped = Stopped::all(tracer, target.pid(), Instant::now()).unwrap();
            assert_eq!(stopped.threads().count(), 21);
            stopped.release().unwrap();
        });
    }
    target.finish_well();
}

/// Check that a thread is found within a range by its instruction pointer, by a return
/// address and by what a signal frame has saved, and not at the first byte of a range.
#[test]
fn anyone_within() {
    let target = Target::interrupted("sigsuspend");
    trace(|tracer| {
        let stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
        let thread = stopped.threads().next().unwrap();
        let rip = thread.registers.rip;
        let within = |range| stopped.is_anyone_within(&[range]).unwrap();
        assert!(within(rip - 1..rip + 1));
        assert!(!within(rip..rip + 1));
        assert!(!within(rip - 5..rip));
        // main's return address, somewhere in the C library.
        let maps = stopped.maps().unwrap();
        let is_code = |word: u64| {
            let entry = within::mapping_at(&maps, word);
            entry.is_some_and(|entry| entry.executable && entry.is_file() && word != rip)
        };
        let mut words = vec![0; 4096];
        stopped.read(thread.registers.rsp, &mut words).unwrap();
        let back = words
            .as_chunks()
            .0
            .iter()
            .map(|word| u64::from_ne_bytes(*word))
            .find(|&word| is_code(word))
            .unwrap();
        assert!(within(back - 2..back + 3));
    });
    drop(target);
}

/// Check that code is exchanged in private, read-only memory, also up against a page's
/// end; and that other bytes than expected, or a write across pages, change nothing.
#[test]
fn writes_code() {
    let target = Target::interrupted("read");
    trace(|tracer| {
        let stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
        let maps = stopped.maps().unwrap();
        let code = maps
            .iter()
            .find(|entry| entry.executable && entry.is_file())
            .unwrap();
        let at = |address| {
            let mut bytes = [0; 5];
            stopped.read(address, &mut bytes).unwrap();
            bytes
        };
        let new = [1, 2, 3, 4, 5];
        for address in [code.start.0 + 3, code.start.0 + PAGE - 5] {
            let old = at(address);
            let around = (at(address - 3), at(address.min(code.end.0 - 10) + 5));
            stopped.write_code(address, &old, &new).unwrap();
            assert_eq!(at(address), new);
            let error = stopped.write_code(address, &old, &new).unwrap_err();
            assert!(matches!(error, StopError::OtherCode { found, .. } if found == new));
            stopped.write_code(address, &new, &old).unwrap();
            assert_eq!(at(address), old);
            assert_eq!(
                (at(address - 3), at(address.min(code.end.0 - 10) + 5)),
                around
            );
        }
        let across = stopped.write_code(code.start.0 + PAGE - 4, &new, &new);
        assert!(
            matches!(across, Err(StopError::CrossesPage { .. })),
            "{across:?}"
        );
    });
    target.finish_well();
}

/// Check that a process that is killed while calls are made in it is said to have ended,
/// and that its parent learns how.
#[test]
fn killed_amid_calls() {
    let target = Target::hazard(&["spinners", "3"]);
    trace(|tracer| {
        let mut stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
        let error = stopped.inject(|calls| {
            calls.call(libc::SYS_getpid, [0; 6])?;
            target.kill(Signal::SIGKILL);
            calls.call(libc::SYS_getpid, [0; 6])
        });
        assert!(matches!(error, Err(InjectError::Ended { .. })), "{error:?}");
        stopped.release().unwrap();
    });
    let (status, _) = target.finish();
    assert_eq!(status.signal(), Some(libc::SIGKILL));
}

/// Check that a process whose threads make execve(2), again and again, is stopped or said
/// to have ended threads, and never left standing.
#[test]
fn execve_meanwhile() {
    let target = Target::hazard(&["exec"]);
    let mut stops = 0;
    for _ in 0..200 {
        trace(|tracer| match Stopped::all(tracer, target.pid(), soon()) {
            Ok(stopped) => {
                stops += 1;
                stopped.release().unwrap();
            }
            // A program that begins has no thread pointer yet, nor any code but the loader's.
            // While the id changes hands, the kernel knows no process by it.
            Err(
                StopError::NoThreadPointer { .. }
                | StopError::Ended { .. }
                | StopError::Process(ProcessError::NotFound { .. }),
            ) => {}
            Err(error) => panic!("{error}"),
        });
    }
    println!("{stops} of 200 stops between execve(2)");
    assert!(stops > 20, "{stops}");
    target.finish_well();
}
