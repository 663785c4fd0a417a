//! Where a process comes from: its user, its pid namespaces, its cgroup.

use serde::Serialize;

use super::cgroup::Cgroup;

/// The number that is nobody's user id (`chown(2)`).
const UNKNOWN_UID: u32 = u32::MAX;

/// Where a process comes from, as profiles and lists of processes show it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Origin {
    /// Effective user id.
    pub uid: u32,
    /// Its ids in the pid namespaces that it is in, memprof's own first. The last is the one
    /// that it knows itself by.
    pub namespace_pids: Vec<u32>,
    /// Its cgroup.
    #[serde(flatten)]
    pub cgroup: Cgroup,
}

impl Origin {
    /// Reads that of `pid`, given the text of its `/proc/PID/status`.
    pub(super) fn read(pid: u32, status: &str) -> Self {
        let mut namespace_pids = numbers(status, "NSpid:");
        if namespace_pids.is_empty() {
            // A kernel without pid namespaces.
            namespace_pids.push(pid);
        }
        Self {
            // Real, effective, saved, of files.
            uid: numbers(status, "Uid:").get(1).copied().unwrap_or_default(),
            namespace_pids,
            // It may be ending; then the rest is known all the same.
            cgroup: Cgroup::read(pid).unwrap_or_default(),
        }
    }

    /// Of a process that was gone before it could be asked.
    #[must_use]
    pub fn unknown(pid: u32) -> Self {
        Self {
            uid: UNKNOWN_UID,
            namespace_pids: vec![pid],
            ..Self::default()
        }
    }

    /// Its id in its own pid namespace, if that is another than memprof's.
    #[must_use]
    pub fn inner_pid(&self) -> Option<u32> {
        match self.namespace_pids.as_slice() {
            [] | [_] => None,
            [.., inner] => Some(*inner),
        }
    }
}

/// The id that a process knows itself by, from the text of its `/proc/PID/status`.
pub(super) fn own_pid(status: &str) -> Option<u32> {
    numbers(status, "NSpid:").last().copied()
}

/// The numbers in the line that begins with `name`.
fn numbers(status: &str, name: &str) -> Vec<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let fields = line.unwrap_or_default().split_whitespace();
    fields.map_while(|field| field.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that pids of all namespaces and the effective user are read, and that a kernel
    /// without namespaces is no error.
    #[test]
    fn status_lines() {
        let status = "Name:\tapp\nUid:\t1000\t33\t0\t33\nNSpid:\t4242\t17\t1\n";
        let origin = Origin::read(4242, status);
        assert_eq!(origin.uid, 33);
        assert_eq!(origin.namespace_pids, [4242, 17, 1]);
        assert_eq!((origin.inner_pid(), own_pid(status)), (Some(1), Some(1)));
        let origin = Origin::read(4242, "Name:\tapp\n");
        assert_eq!(origin.namespace_pids, [4242]);
        assert_eq!(origin.inner_pid(), None);
        assert_eq!(own_pid("NSpid:\n"), None);
    }
}
