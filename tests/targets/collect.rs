//! Collections, iterators, boxed closures, a thread, and a panic that is caught.

use std::collections::{BTreeMap, HashMap};

fn words(round: usize) -> Vec<String> {
    (0..40).map(|n| format!("{}-{n}", round * n)).collect()
}

fn count(round: usize) -> usize {
    let mut counts: HashMap<String, Vec<usize>> = HashMap::new();
    let mut order: BTreeMap<usize, Box<dyn Fn(usize) -> Vec<usize>>> = BTreeMap::new();
    for (place, word) in words(round).into_iter().enumerate() {
        counts.entry(word).or_default().push(place);
        order.insert(place, Box::new(move |n| vec![n; place + 1]));
    }
    order.values().map(|make| make(round).len()).sum::<usize>() + counts.len()
}

fn main() {
    std::panic::set_hook(Box::new(|_| {}));
    let mut total = 0;
    for round in 0..20 {
        total += count(round);
        let caught = std::panic::catch_unwind(|| assert!(count(1) == 0, "{}", words(2).len()));
        total += usize::from(caught.is_err());
    }
    let threads: Vec<_> = (0..2).map(|n| std::thread::spawn(move || count(n))).collect();
    for thread in threads {
        total += thread.join().unwrap();
    }
    assert!(total > 0);
}
