use memprof_common::config::Places;

use super::{
    tests::{Scratch, mapped},
    *,
};
use crate::process::mapping::Mapping;

fn finder(functions: &[&str], frees: &[&str]) -> Finder {
    let functions = functions.iter().map(|text| text.parse().unwrap());
    let frees = frees.iter().map(|text| text.parse().unwrap());
    Finder::new(&Pools::new(functions.collect(), frees.collect()).unwrap())
}

fn mappings(path: &std::path::Path) -> MappingTable {
    let mut table = MappingTable::default();
    table.insert(Mapping {
        start: crate::address::AbsAddr(0x1000),
        end: crate::address::AbsAddr(0x2000),
        file_offset: FileOffset(0),
        file: Some(mapped(path)),
        name: String::new(),
    });
    table
}

const POOL: &str = "\
    void *(*other)(long); \
    __attribute__((noinline, noclone)) static void *take(void *pool, long n) \
    { __asm__ volatile(\"\"); return n > 9 ? pool : 0; } \
    __attribute__((noinline, noclone)) void give(void *pool, void *p) \
    { if (p) *(void **)p = pool; } \
    void *jump(long n) { return other(n); } ";
const MAIN: &str = "int main() { give(0, take(0, 10)); return 0; }";

/// Check that functions of pools are found whether or not another file sees them, with the
/// places of their arguments and all instructions at which they return; and that one which ends
/// by a jump to nobody knows where gets a return probe.
#[test]
fn functions() {
    let scratch = Scratch::new("pools");
    let path = scratch.build(&format!("{POOL}{MAIN}"), &["-O2"]);
    let finder = finder(&["take:size=2", "jump:size=1"], &["give:ptr=2"]);
    let module = finder.find(&mapped(&path)).unwrap();
    let symbols: std::collections::BTreeSet<_> =
        module.sites.iter().map(|site| site.symbol).collect();
    assert_eq!(symbols, ["give", "jump", "take"].into());
    for site in &module.sites {
        let (function, size, returns) = match site.symbol {
            "take" => (Function::Pool, 1, true),
            "jump" => (Function::Pool, 0, false),
            _ => (Function::PoolFree, 1, true),
        };
        let places = Places {
            size,
            ..Places::default()
        };
        assert_eq!((site.function, site.places), (function, Some(places)));
        assert_eq!(!site.returns.is_empty(), returns, "{}", site.symbol);
        let code = module.code(site).unwrap();
        for at in &site.returns {
            let at = usize::try_from(at.0 - site.file_offset.0).unwrap();
            assert_eq!(code[at], 0xc3, "{}: {at:#x} in {code:x?}", site.symbol);
        }
    }
    assert!(finder.require_pools(7, &mappings(&path)).is_ok());
}

/// Check that all functions of one name are found: what is static in a header is in each part
/// of a program.
#[test]
fn same_name() {
    let scratch = Scratch::new("pools-same");
    let other = scratch.0.path().join("other.c");
    let source = format!("{POOL} void *more() {{ return take(0, 3); }}")
        .replace("void give", "void give2")
        .replace("*jump", "*jump2")
        .replace("(*other)", "(*other2)")
        .replace("other(n)", "other2(n)");
    std::fs::write(&other, source).unwrap();
    let path = scratch.build(&format!("{POOL}{MAIN}"), &[other.to_str().unwrap()]);
    let module = finder(&["take:size=2"], &[]).find(&mapped(&path)).unwrap();
    assert_eq!(module.sites.len(), 2);
    assert!(module.sites.iter().all(|site| site.symbol == "take"));
}

/// Check that a function whose returns are not known is refused if it may throw: by its name,
/// or since its file has to do with exceptions; and that others of the file are not.
#[test]
fn may_throw() {
    let scratch = Scratch::new("pools-throw");
    let mangled = POOL.replace("jump", "_ZN4Pool4jumpEl");
    let rust = POOL.replace("jump", "_RNvC4pool4jump");
    let marked = |mark: &str| format!("{POOL} void {mark}() {{}}");
    for (source, symbol) in [
        (mangled, "_ZN4Pool4jumpEl"),
        (rust, "_RNvC4pool4jump"),
        (marked("__gxx_personality_v0"), "jump"),
        (marked("__cxa_throw"), "jump"),
        (marked("rust_eh_personality"), "jump"),
    ] {
        let path = scratch.build(&format!("{source}{MAIN}"), &["-O2"]);
        let both = finder(&["take:size=2", &format!("{symbol}:size=1")], &[]);
        let module = both.find(&mapped(&path)).unwrap();
        assert_eq!(module.sites.len(), 1, "{symbol}");
        assert_eq!(module.sites[0].symbol, "take");
        let error = both.require_pools(7, &mappings(&path)).unwrap_err();
        let is_it = matches!(
            &error,
            FindError::Refused { symbol: refused, refusal: PoolRefusal::MayThrow, .. }
                if *refused == symbol
        );
        assert!(is_it, "{error}");
    }
}

/// Check that a function which no file has is an error that names it and says where it was
/// looked for, and one that is chosen at run time another.
#[test]
fn missing() {
    let scratch = Scratch::new("pools-missing");
    let chosen = "void *r(long n) { return 0; } void *(*pick())(long) { return r; }\
        void *chosen(long) __attribute__((ifunc(\"pick\")));";
    let path = scratch.build(&format!("{POOL}{chosen}{MAIN}"), &[]);
    let table = mappings(&path);
    let error = |finder: Finder| finder.require_pools(7, &table).unwrap_err().to_string();
    let gone = error(finder(&["take:size=2", "gone:size=1"], &[]));
    assert!(gone.contains("pid 7 has no function `gone`"), "{gone}");
    assert!(gone.ends_with(&format!("in {}", path.display())), "{gone}");
    let gone = error(finder(&["take:size=2"], &["no:ptr=1"]));
    assert!(gone.contains("`no`"), "{gone}");
    let late = error(finder(&["chosen:size=1"], &[]));
    assert!(
        late.contains("`chosen`") && late.contains("run time"),
        "{late}"
    );
    assert!(Finder::default().require_pools(7, &table).is_ok());
    // A variable is none, nor is what another file is to have.
    let variable = error(finder(&["other:size=1"], &[]));
    assert!(variable.contains("no function `other`"), "{variable}");
    let imported = error(finder(&["__libc_start_main:size=1"], &[]));
    assert!(imported.contains("no function"), "{imported}");
}

/// Check that the name of an allocator's function is that function's, and that a pool's function
/// which is nothing but a jump to one is seen there; and one that ends by such a jump has a return
/// probe.
#[test]
fn beside_allocators() {
    let scratch = Scratch::new("pools-beside");
    let source = "\
        __attribute__((noinline)) void *malloc(long n) { __asm__ volatile(\"\"); return (void *)n; } \
        __attribute__((noinline)) void free(void *p) { __asm__ volatile(\"\"); } \
        void *same(long n) __attribute__((alias(\"malloc\"))); \
        void *nearly(long n) { return malloc(n ? n : 1); } \
        void *calls(long n) { void *p = malloc(n); __asm__ volatile(\"\"); return p; } \
        __asm__(\".globl thunk\\n.type thunk, @function\\nthunk: jmp malloc\\n.size thunk, 5\"); \
        int main() { return 0; }";
    let path = scratch.build(source, &["-O2", "-static", "-nostdlib", "-Wl,-e,main"]);
    let functions = [
        "same:size=1",
        "thunk:size=1",
        "nearly:size=1",
        "calls:size=1",
    ];
    let finder = finder(&functions, &[]);
    let module = finder.find(&mapped(&path)).unwrap();
    assert_eq!(module.sites.len(), 4);
    // Its return would be malloc's, which has a return probe.
    for (symbol, has_returns) in [("nearly", false), ("calls", true)] {
        let site = module.sites.iter().find(|site| site.symbol == symbol);
        assert_eq!(!site.unwrap().returns.is_empty(), has_returns, "{symbol}");
    }
    let malloc = module.sites.iter().find(|site| site.symbol == "malloc");
    let malloc = malloc.unwrap();
    assert_eq!(malloc.function, Function::Malloc);
    assert!(malloc.is_called("same") && malloc.is_called("thunk"));
    assert!(finder.require_pools(7, &mappings(&path)).is_ok());
}
