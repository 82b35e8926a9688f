// Computes on its own thread and on those of libuv, and checks what comes out: `busy.js OUTPUT`. Each round writes `N ok` to OUTPUT, or `N error`.
const fs = require("fs"), crypto = require("crypto");
const out = fs.openSync(process.argv[2], "a");
const sum = () => crypto.createHash("sha256").update(Buffer.alloc(1 << 20, 7)).digest("hex");
const fibonacci = (n) => (n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2));
const expected = { sum: sum(), key: crypto.pbkdf2Sync("word", "salt", 1000, 32, "sha256").toString("hex") };
let number = 0;

function round() {
  crypto.pbkdf2("word", "salt", 1000, 32, "sha256", (error, key) => {
    const right = !error && key.toString("hex") === expected.key && fibonacci(20) === 6765 && sum() === expected.sum;
    fs.writeSync(out, `${++number} ${right ? "ok" : "error"}\n`);
    setTimeout(round, 20);
  });
}
round();
