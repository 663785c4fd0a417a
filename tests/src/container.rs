//! A process in namespaces and a cgroup of its own, made with what every system has.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{
    daemon::eventually,
    dir::TempDir,
    running::Running,
    targets::{Target, copy_program, target_with},
};

/// What Debian's `musl` and `musl-dev` install.
const MUSL_SPECS: &str = "-specs=/usr/lib/x86_64-linux-musl/musl-gcc.specs";
const MUSL_LOADER: &str = "/lib/ld-musl-x86_64.so.1";

/// Where the program is in its root. On the host another one has that path.
pub const PROGRAM: &str = "/usr/bin/head";

/// Makes `$1` the root of the mount namespace that it runs in, leaves the old one behind, and
/// runs the program as a child of the first process there.
const ENTER: &str = r#"set -e
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
cd "$1"
pivot_root . old
exec /bin/busybox sh -c '/bin/busybox umount -l /old; /usr/bin/head 10 100; exit $?'
"#;

/// Who the first process of a container is on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// Root.
    Root,
    /// Nobody, who is root in a user namespace: a container without privileges.
    Nobody,
}

/// A program with the arguments `10 100`, in a mount and a pid namespace. Its root has busybox,
/// musl as a shared library and the program.
pub struct Container {
    /// What made the namespaces, with the streams of the program.
    pub running: Running,
    /// The program as the host knows it.
    pub pid: u32,
    /// The program as it knows itself.
    pub inner_pid: u32,
}

impl Container {
    /// Starts one of `targets/hold.c` with its root in `dir`, and waits until it is ready.
    #[must_use]
    pub fn start(dir: &TempDir, user: User) -> Self {
        Self::run(dir, user, &target_with("hold.c", &[MUSL_SPECS]))
    }

    /// Starts one of another program, which needs no other files.
    #[must_use]
    pub fn run(dir: &TempDir, user: User, program: &Target) -> Self {
        let root = dir.path().join("root");
        make_root(&root, program.path());
        let mut command = match user {
            User::Root => Command::new("unshare"),
            User::Nobody => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
                command.args(["unshare", "--user", "--map-root-user"]);
                command
            }
        };
        command.args(["--mount", "--pid", "--fork", "sh", "-c", ENTER, "sh"]);
        let running = Running::spawn(command.arg(&root));
        running.wait_stdout(|line| line == "ready");
        let (pid, inner_pid) = eventually(|| {
            let program = descendants(running.pid()).into_iter().find(|&pid| {
                fs::read_link(format!("/proc/{pid}/exe")).ok() == Some(PROGRAM.into())
            })?;
            let status = fs::read_to_string(format!("/proc/{program}/status")).ok()?;
            let pids = status
                .lines()
                .find_map(|line| line.strip_prefix("NSpid:"))?;
            Some((program, pids.split_whitespace().last()?.parse().ok()?))
        });
        Self {
            running,
            pid,
            inner_pid,
        }
    }
}

fn make_root(root: &Path, program: &Path) {
    for directory in ["bin", "lib", "usr/bin", "proc", "old"] {
        fs::create_dir_all(root.join(directory)).expect("a root directory");
    }
    for (from, to) in [
        (Path::new("/bin/busybox"), "/bin/busybox"),
        (Path::new(MUSL_LOADER), MUSL_LOADER),
        (program, PROGRAM),
    ] {
        let to = root.join(to.trim_start_matches('/'));
        copy_program(from, &to);
        fs::set_permissions(&to, Permissions::from_mode(0o755)).expect("its permissions");
    }
}

/// The children of a process, and theirs.
fn descendants(pid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("/proc");
    let parents: Vec<(u32, u32)> = processes
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
            Some((pid, parent.trim().parse().ok()?))
        })
        .collect();
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(
            parents
                .iter()
                .filter(|(_, of)| *of == parent)
                .map(|(pid, _)| pid),
        );
        next += 1;
    }
    found.split_off(1)
}

/// A cgroup of version 2, with those above it; they go with the value.
pub struct Cgroup {
    /// From the innermost to the outermost.
    made: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes `path` in a group of this test's own.
    #[must_use]
    pub fn make(path: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut directory = hierarchy().join(format!("memprof-{}-{number}", process::id()));
        let mut cgroup = Self { made: Vec::new() };
        for part in [""].into_iter().chain(path.split('/')) {
            if !part.is_empty() {
                directory.push(part);
            }
            fs::create_dir(&directory).unwrap_or_else(|error| {
                panic!(
                    "the test needs a cgroup2 that it can write: {}: {error}",
                    directory.display()
                )
            });
            cgroup.made.insert(0, directory.clone());
        }
        cgroup
    }

    /// Puts a process into it.
    pub fn enter(&self, pid: u32) {
        let procs = self.directory().join("cgroup.procs");
        fs::write(&procs, pid.to_string())
            .unwrap_or_else(|error| panic!("{}: {error}", procs.display()));
    }

    /// Its path below the root of the hierarchy.
    #[must_use]
    pub fn path(&self) -> String {
        let below = self.directory().strip_prefix(hierarchy()).expect("a group");
        format!("/{}", below.display())
    }

    fn directory(&self) -> &Path {
        self.made.first().expect("a group")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for directory in &self.made {
            // Its processes may be on their way out.
            for _ in 0..50 {
                match fs::remove_dir(directory) {
                    Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                        std::thread::sleep(std::time::Duration::from_millis(20));
                    }
                    _ => break,
                }
            }
        }
    }
}

/// Where cgroup v2 is mounted.
fn hierarchy() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").expect("/proc/mounts");
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (place, kind) = (fields.nth(1)?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(place))
    });
    mount.expect("the test needs cgroup2: mount -t cgroup2 none /sys/fs/cgroup/unified")
}
