// Allocates native memory from functions that V8 has compiled before memprof attaches.
'use strict';

function hotLeaf(i) {
    return Buffer.allocUnsafeSlow(70000 + (i & 1));
}

function hotMiddle(i) {
    return hotLeaf(i).length;
}

let sum = 0;
function round(count) {
    for (let i = 0; i < count; i++) {
        sum += hotMiddle(i);
    }
}

round(30000);
process.stdout.write('ready\n');
process.stdin.once('data', () => {
    // V8 has code of its own for each function that runs for the first time; rounds give
    // memprof time to learn where.
    let left = 20;
    const timer = setInterval(() => {
        round(50);
        if (--left === 0) {
            clearInterval(timer);
            process.stdout.write('done\n');
        }
    }, 30);
    process.stdin.on('end', () => process.exit(sum > 0 ? 0 : 1)).resume();
});
