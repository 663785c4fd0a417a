//! Where a process stands among cgroups, and what that tells of the container, pod and
//! service that it belongs to.
//!
//! Container runtimes and systemd name cgroups after what is in them. No runtime is asked:
//! the path is all there is, and what it does not tell is not known.

use std::fs;

use serde::Serialize;

use super::{info::ProcessError, maps::split_deleted};

/// Hexadecimal digits of the ids that container runtimes give.
const ID_DIGITS: usize = 64;

/// The cgroup of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cgroup {
    /// Its path below the root of the hierarchy: that of cgroup v2 or of systemd, or of any
    /// other if these have the process in their root. Empty if it is not known.
    #[serde(rename = "cgroup")]
    pub path: String,
    /// The container that the path names.
    pub container: Option<Container>,
    /// The systemd unit (a service or a scope) that the path names.
    pub unit: Option<String>,
    /// The systemd slice that this is in.
    pub slice: Option<String>,
}

/// A container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Container {
    /// Who made it; none if the path does not tell.
    pub runtime: Option<Runtime>,
    /// Its id: 64 hexadecimal digits.
    pub id: String,
    /// The uid of its Kubernetes pod.
    pub pod_uid: Option<String>,
}

/// Container runtimes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Runtime {
    /// Docker.
    Docker,
    /// containerd, of Kubernetes or of nerdctl.
    Containerd,
    /// CRI-O.
    CriO,
    /// Podman.
    Podman,
}

impl Runtime {
    /// As it calls itself.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Containerd => "containerd",
            Self::CriO => "cri-o",
            Self::Podman => "podman",
        }
    }

    /// What runtimes put before an id. Their helpers (`crio-conmon-`, `libpod-conmon-`) are
    /// not in the container, and what follows here is no id then.
    const PREFIXES: [(&'static str, Self); 6] = [
        ("docker-", Self::Docker),
        ("cri-containerd-", Self::Containerd),
        ("nerdctl-", Self::Containerd),
        ("crio-", Self::CriO),
        ("libpod-payload-", Self::Podman),
        ("libpod-", Self::Podman),
    ];
}

impl Cgroup {
    /// Reads that of process `pid`, as memprof's own cgroup namespace shows it.
    ///
    /// # Errors
    ///
    /// There is no such process.
    pub fn read(pid: u32) -> Result<Self, ProcessError> {
        let text = fs::read(format!("/proc/{pid}/cgroup"))
            .map_err(|error| ProcessError::from_io(pid, error))?;
        Ok(Self::parse(&text))
    }

    /// Reads the text of `/proc/PID/cgroup`: lines `ID:CONTROLLERS:PATH`, of which cgroup v2
    /// has one, without controllers, and v1 one a hierarchy (cgroups(7)).
    #[must_use]
    pub fn parse(text: &[u8]) -> Self {
        let mut paths: Vec<(u8, String)> = text
            .split(|&byte| byte == b'\n')
            .filter_map(|line| {
                let mut fields = line.splitn(3, |&byte| byte == b':');
                let (_id, controllers) = (fields.next()?, fields.next()?);
                let (path, _) = split_deleted(fields.next()?);
                let rank = match controllers {
                    b"" => 0,
                    b"name=systemd" => 1,
                    _ => 2,
                };
                Some((rank, String::from_utf8_lossy(path).into_owned()))
            })
            .collect();
        // With both versions mounted, a runtime without systemd may have set up one of them.
        paths.sort_by_key(|(rank, path)| (container(path).is_none(), path == "/", *rank));
        let path = paths.into_iter().next().map(|(_, path)| path);
        Self::at(path.unwrap_or_default())
    }

    /// What a path tells.
    #[must_use]
    pub fn at(path: String) -> Self {
        let named = |endings: &[&str]| {
            let is_named = |part: &&str| endings.iter().any(|ending| part.ends_with(ending));
            path.split('/').rfind(is_named).map(unescaped)
        };
        Self {
            container: container(&path),
            unit: named(&[".service", ".scope"]),
            slice: named(&[".slice"]),
            path,
        }
    }
}

/// systemd puts `_` before what begins with a dot, an underscore or the name of a controller
/// (`cg_escape` in src/basic/cgroup-util.c, systemd 252).
fn unescaped(part: &str) -> String {
    part.strip_prefix('_').unwrap_or(part).to_owned()
}

/// The innermost container: there can be some in others.
fn container(path: &str) -> Option<Container> {
    let parts: Vec<&str> = path.split('/').collect();
    let (place, runtime, id) = parts.iter().enumerate().rev().find_map(|(place, part)| {
        let above = place.checked_sub(1).and_then(|above| parts.get(above));
        named_container(part, above.copied().unwrap_or_default())
            .map(|(runtime, id)| (place, runtime, id))
    })?;
    let above = parts.get(..=place).unwrap_or_default();
    Some(Container {
        runtime,
        id: id.to_owned(),
        pod_uid: above.iter().rev().find_map(|part| pod_uid(part)),
    })
}

/// The container that one part of a path names, given the part above.
fn named_container<'a>(part: &'a str, above: &str) -> Option<(Option<Runtime>, &'a str)> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    // As runc is told by containerd where only one of both was set up for systemd:
    // `kubepods-pod….slice:cri-containerd:ID`.
    if let Some((rest, id)) = name.rsplit_once(':') {
        let runtime = match rest.rsplit_once(':').map(|(_, prefix)| prefix) {
            Some("cri-containerd") => Some(Runtime::Containerd),
            Some("crio") => Some(Runtime::CriO),
            _ => None,
        };
        return is_id(id).then_some((runtime, id));
    }
    for (prefix, runtime) in Runtime::PREFIXES {
        if let Some(id) = name.strip_prefix(prefix) {
            return is_id(id).then_some((Some(runtime), id));
        }
    }
    is_id(name).then(|| (is_docker(above).then_some(Runtime::Docker), name))
}

/// Without systemd Docker's containers are in a group of that name; those of Kubernetes are
/// in their pod's whoever runs them.
fn is_docker(above: &str) -> bool {
    above == "docker"
}

fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && is_hex(text)
}

fn is_hex(text: &str) -> bool {
    text.bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The uid in the name of a pod's group: `podUID`, or a slice such as
/// `kubepods-burstable-podUID.slice`, whose `-` are `_` (in slices `-` is what `/` is in
/// paths). A pod that the kubelet has from a file has 32 digits without any.
fn pod_uid(part: &str) -> Option<String> {
    let part = part.split(':').next().unwrap_or(part);
    let uid = match part.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => part.strip_prefix("pod")?.to_owned(),
    };
    let groups: Vec<&str> = uid.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    let is_uid = matches!(lengths.as_slice(), [32] | [8, 4, 4, 4, 12])
        && groups.iter().all(|group| is_hex(group));
    is_uid.then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "3f2b0c9d8e7a6b5c4d3e2f1a0b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c";
    const OUTER: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
    const POD: &str = "0e7d3c1a-94b8-4f6c-8d21-5a0b9c7e6f32";
    const POD_IN_SLICE: &str = "0e7d3c1a_94b8_4f6c_8d21_5a0b9c7e6f32";

    /// Check which container and pod the paths of each runtime name, by systemd and without,
    /// and in one another.
    #[test]
    fn containers() {
        let pod = Some(POD);
        let kubepods = format!(
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_IN_SLICE}.slice"
        );
        for (path, runtime, pod) in [
            (format!("/docker/{ID}"), Some("docker"), None),
            (
                format!("/system.slice/docker-{ID}.scope"),
                Some("docker"),
                None,
            ),
            (
                format!("/system.slice/docker-{ID}.scope/init"),
                Some("docker"),
                None,
            ),
            (format!("/docker/{OUTER}/docker/{ID}"), Some("docker"), None),
            (format!("/kubepods/besteffort/pod{POD}/{ID}"), None, pod),
            (format!("/kubepods/pod{POD}/{ID}"), None, pod),
            (format!("{kubepods}/docker-{ID}.scope"), Some("docker"), pod),
            (
                format!("{kubepods}/cri-containerd-{ID}.scope"),
                Some("containerd"),
                pod,
            ),
            (
                format!(
                    "/system.slice/containerd.service/kubepods-pod{POD_IN_SLICE}.slice:cri-containerd:{ID}"
                ),
                Some("containerd"),
                pod,
            ),
            (
                format!("/system.slice/nerdctl-{ID}.scope"),
                Some("containerd"),
                None,
            ),
            (format!("/default/{ID}"), None, None),
            (format!("/k8s.io/{ID}"), None, None),
            (format!("{kubepods}/crio-{ID}.scope"), Some("cri-o"), pod),
            (
                format!("{kubepods}/crio-{ID}.scope/container"),
                Some("cri-o"),
                pod,
            ),
            (
                format!("/kubepods/burstable/pod{POD}/crio-{ID}"),
                Some("cri-o"),
                pod,
            ),
            (
                format!("/machine.slice/libpod-{ID}.scope/container"),
                Some("podman"),
                None,
            ),
            (
                format!("/machine.slice/machine-libpod_pod_{OUTER}.slice/libpod-{ID}.scope"),
                Some("podman"),
                None,
            ),
            (
                format!(
                    "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container"
                ),
                Some("podman"),
                None,
            ),
            (format!("/libpod_parent/libpod-{ID}"), Some("podman"), None),
            (
                format!("/system.slice/web.service/libpod-payload-{ID}"),
                Some("podman"),
                None,
            ),
            (
                format!("/ecs/0123456789abcdef0123456789abcdef/{ID}"),
                None,
                None,
            ),
            // kind: a node that is a container.
            (
                format!(
                    "/system.slice/docker-{OUTER}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{POD_IN_SLICE}.slice/cri-containerd-{ID}.scope"
                ),
                Some("containerd"),
                pod,
            ),
        ] {
            let container = Cgroup::at(path.clone()).container;
            let container = container.unwrap_or_else(|| panic!("{path}"));
            assert_eq!(container.runtime.map(Runtime::name), runtime, "{path}");
            assert_eq!(container.id, ID, "{path}");
            assert_eq!(container.pod_uid.as_deref(), pod, "{path}");
        }
    }

    /// Check that a pod from a file, whose uid has no dashes, is known in both forms.
    #[test]
    fn static_pods() {
        let pod = "b3c1f7a2d4e5968778695a4b3c2d1e0f";
        for path in [
            format!("/kubepods/burstable/pod{pod}/{ID}"),
            format!("/kubepods.slice/kubepods-burstable-pod{pod}.slice/crio-{ID}.scope"),
        ] {
            let container = Cgroup::at(path).container.unwrap();
            assert_eq!(container.pod_uid.as_deref(), Some(pod));
        }
    }

    /// Check that what is beside containers, or looks like one, is none.
    #[test]
    fn no_containers() {
        for path in [
            "",
            "/",
            "/system.slice/docker.service",
            "/system.slice/docker-short.scope",
            &format!("/machine.slice/libpod-conmon-{ID}.scope"),
            &format!("/system.slice/crio-conmon-{ID}.scope"),
            &format!("/docker/buildx/{}", &ID[1..]),
            &format!("/docker/{}", ID.to_uppercase()),
            &format!("/kubepods/burstable/pod{POD}"),
            "/user.slice/user-1000.slice/session-2.scope",
            "/docker//",
            ":::",
        ] {
            assert_eq!(Cgroup::at(path.to_owned()).container, None, "{path}");
        }
        // A container in a group that only begins like a pod's.
        let odd = Cgroup::at(format!("/kubepods/podman/{ID}"))
            .container
            .unwrap();
        assert_eq!(odd.pod_uid, None);
    }

    /// Check which unit and slice a path names: the innermost of each.
    #[test]
    fn units() {
        for (path, unit, slice) in [
            ("/", None, None),
            ("/init.scope", Some("init.scope"), None),
            (
                "/system.slice/redis-server.service",
                Some("redis-server.service"),
                Some("system.slice"),
            ),
            (
                "/system.slice/system-postgresql.slice/postgresql@15-main.service",
                Some("postgresql@15-main.service"),
                Some("system-postgresql.slice"),
            ),
            (
                "/user.slice/user-1000.slice/user@1000.service/app.slice/app-firefox.scope/tab",
                Some("app-firefox.scope"),
                Some("app.slice"),
            ),
            (
                "/user.slice/user-1000.slice/session-2.scope",
                Some("session-2.scope"),
                Some("user-1000.slice"),
            ),
            (
                "/system.slice/_cpu.service",
                Some("cpu.service"),
                Some("system.slice"),
            ),
            ("/docker/abc", None, None),
        ] {
            let cgroup = Cgroup::at(path.to_owned());
            assert_eq!(cgroup.unit.as_deref(), unit, "{path}");
            assert_eq!(cgroup.slice.as_deref(), slice, "{path}");
        }
    }

    /// Check which of the hierarchies is believed: v2, then systemd's, then others, but first
    /// one with a container, and the root of none if there is another path.
    #[test]
    fn hierarchies() {
        let docker = format!("12:pids:/docker/{ID}\n1:name=systemd:/docker/{ID}\n0::/\n");
        let unit = "/system.slice/a.service";
        for (text, path) in [
            ("0::/init.scope\n".to_owned(), "/init.scope".to_owned()),
            (docker, format!("/docker/{ID}")),
            (format!("0::{unit}\n9:name=systemd:/b\n"), unit.to_owned()),
            (
                format!("9:name=systemd:{unit}\n4:memory:/x\n0::/\n"),
                unit.to_owned(),
            ),
            (
                "4:memory:/x\n9:name=systemd:/\n0::/\n".to_owned(),
                "/x".to_owned(),
            ),
            (
                "4:memory:/\n9:name=systemd:/\n0::/\n".to_owned(),
                "/".to_owned(),
            ),
            (
                format!("0::{unit}\n4:memory:/docker/{ID}\n"),
                format!("/docker/{ID}"),
            ),
            (
                "0::/a.service (deleted)\n".to_owned(),
                "/a.service".to_owned(),
            ),
            ("0::/a:b:c\n".to_owned(), "/a:b:c".to_owned()),
            ("3:cpu,cpuacct:/k\n".to_owned(), "/k".to_owned()),
            // As seen from a cgroup namespace that it is not in.
            ("0::/../../b\n".to_owned(), "/../../b".to_owned()),
            (String::new(), String::new()),
            ("nonsense\n".to_owned(), String::new()),
        ] {
            assert_eq!(Cgroup::parse(text.as_bytes()).path, path, "{text}");
        }
    }

    /// Check that this process's own is read, and that one that is not there is an error.
    #[test]
    fn own_cgroup() {
        let own = Cgroup::read(std::process::id()).unwrap();
        assert!(own.path.starts_with('/'), "{own:?}");
        let error = Cgroup::read(u32::MAX).unwrap_err();
        assert!(matches!(error, ProcessError::NotFound { .. }), "{error}");
    }
}
