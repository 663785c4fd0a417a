//! What the ways through the functions of a file say of them.

use std::{fs::File, ops::Range};

use memprof_common::function::Function;

use super::{
    FoundSite,
    flow::{Depth, follow},
    linkage::Linkage,
    names::twin,
};
use crate::{address::VirtOffset, process::elf::ElfLayout};

/// Looks where each of `sites` leads; `codes` has their addresses. Those are left out that may
/// throw and have others of the file do what they are for, where it is seen.
pub(super) fn look_into(
    file: &File,
    layout: &ElfLayout,
    sites: &mut Vec<FoundSite>,
    codes: &mut Vec<(u64, Vec<u8>)>,
) {
    let mut linkage = Linkage::new(file, layout);
    let addresses: Vec<u64> = codes.iter().map(|&(address, _)| address).collect();
    let others = |except: u64, among: &[u64]| -> Vec<u64> {
        let among = among.iter().copied();
        among.filter(|&address| address != except).collect()
    };
    let allocating: Vec<u64> = sites
        .iter()
        .zip(&addresses)
        .filter(|(site, _)| !site.function.is_free())
        .map(|(_, &address)| address)
        .collect();
    let mut is_own = Vec::with_capacity(sites.len());
    for (site, &address) in sites.iter().zip(&addresses) {
        let others = others(address, &allocating);
        let function = (site.function, address);
        let leads_on = site.function.throws()
            && follow(file, layout, &mut linkage, function, &others, Depth::Calls).leads_on;
        is_own.push(!leads_on);
    }
    let mut own = is_own.iter();
    sites.retain(|_| own.next().copied().unwrap_or(true));
    let mut own = is_own.iter();
    codes.retain(|_| own.next().copied().unwrap_or(true));

    let addresses: Vec<u64> = codes.iter().map(|&(address, _)| address).collect();
    let frees: Vec<u64> = sites
        .iter()
        .zip(&addresses)
        .filter(|(site, _)| site.function.is_free())
        .map(|(_, &address)| address)
        .collect();
    // Those that take nothing but the block.
    let plain_frees: Vec<(u64, bool)> = sites
        .iter()
        .zip(&addresses)
        .filter(|(site, _)| PLAIN_FREES.iter().any(|name| site.is_called(name)))
        .map(|(site, &address)| (address, site.is_called("_ZdlPv")))
        .collect();
    let places: Vec<_> = sites
        .iter()
        .map(|site| (names_of(site), site.file_offset))
        .collect();
    // Where a return probe takes the place of the return address.
    let have_return_probes: Vec<Range<u64>> = sites
        .iter()
        .zip(&addresses)
        .filter(|(site, _)| !site.function.is_free() && site.places.is_none())
        .map(|(site, &address)| address..address.saturating_add(site.code_bytes))
        .collect();
    for (site, &address) in sites.iter_mut().zip(&addresses) {
        let function = (site.function, address);
        let code_offset = |address: u64| layout.code_offset(VirtOffset(address));
        match site.function {
            Function::Malloc | Function::Mallocx => {
                let others = others(address, &addresses);
                let flow = follow(file, layout, &mut linkage, function, &others, Depth::Jumps);
                // As allocators that are built for debugging do.
                if flow.leads_on {
                    site.function = Function::Valloc;
                }
            }
            pool if pool.is_pool() => {
                let flow = follow(file, layout, &mut linkage, function, &[], Depth::Jumps);
                let ends_elsewhere = flow.returns.iter().any(|at| {
                    let mut others = have_return_probes.iter();
                    others.any(|other| other.contains(at))
                });
                // If some are not known, a call that has returned would be taken for one under
                // way; and one that ends by a jump to `malloc`, for one that an exception has
                // ended.
                if !flow.is_unknown && !ends_elsewhere {
                    let returns = flow.returns.iter().copied();
                    site.returns = returns.filter_map(code_offset).collect();
                }
            }
            throwing if throwing.throws() => {
                let flow = follow(file, layout, &mut linkage, function, &[], Depth::Jumps);
                site.returns = flow
                    .returns
                    .iter()
                    .copied()
                    .filter_map(code_offset)
                    .collect();
                let twins: Vec<_> = names_of(site).into_iter().filter_map(twin).collect();
                let has_one = |names: &[&str]| twins.iter().any(|twin| names.contains(twin));
                let place = places.iter().find(|(names, _)| has_one(names));
                site.twin = place.map(|&(_, offset)| offset);
            }
            free if free.is_free() => {
                let others = others(address, &frees);
                let flow = follow(file, layout, &mut linkage, function, &others, Depth::Jumps);
                site.passes_on = flow
                    .passes
                    .iter()
                    .filter_map(|&(at, _)| code_offset(at))
                    .collect();
                // A plain one, so that no two lead to each other, and arguments mean the same.
                let is_plain = plain_frees.iter().any(|&(plain, _)| plain == address);
                let goals = flow.passes.iter().map(|&(_, goal)| goal);
                let of_goals =
                    |&&(plain, _): &&(u64, bool)| goals.clone().any(|goal| goal == plain);
                let is_delete = names_of(site).iter().any(|name| name.starts_with("_Zd"));
                let delete = || {
                    plain_frees
                        .iter()
                        .find(|&&(_, deletes)| deletes && is_delete)
                };
                let goal = plain_frees.iter().find(of_goals).or_else(delete);
                let goal = goal.filter(|_| !is_plain && !flow.passes.is_empty());
                let goal = goal.map(|&(plain, _)| plain);
                site.twin = goal.and_then(code_offset);
            }
            _ => {}
        }
    }
}

/// Functions that take a block and nothing else.
const PLAIN_FREES: [&str; 6] = [
    "free",
    "je_free",
    "_rjem_free",
    "tc_free",
    "mi_free",
    "_ZdlPv",
];

fn names_of(site: &FoundSite) -> Vec<&'static str> {
    let aliases = site.aliases.iter().copied();
    std::iter::once(site.symbol).chain(aliases).collect()
}
