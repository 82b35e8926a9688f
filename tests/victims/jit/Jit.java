/**
 * Computes on four threads, fast enough to be compiled while it runs, and makes garbage: `java Jit OUTPUT`. Each round writes `N ok` to OUTPUT, or
 * `N error`. Jit.class is this, compiled by `javac --release 17`: a JRE has no compiler.
 */
import java.io.FileWriter;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;

public class Jit {
    static final int STEPS = 200_000;

    static long work() {
        long hash = 1_125_899_906_842_597L;
        for (int i = 0; i < STEPS; i++) {
            hash = 31 * hash + (hash >>> 7) + i;
        }
        return hash;
    }

    public static void main(String[] args) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(4);
        long expected = work();
        try (FileWriter out = new FileWriter(args[0], true)) {
            for (int number = 1;; number++) {
                List<Future<Long>> results = new ArrayList<>();
                for (int i = 0; i < 4; i++) {
                    results.add(pool.submit(Jit::work));
                }
                boolean right = true;
                for (Future<Long> result : results) {
                    right &= result.get() == expected;
                }
                byte[] garbage = new byte[1 << 20];
                garbage[number & 0xfffff] = 1;
                out.write(number + (right ? " ok\n" : " error\n"));
                out.flush();
                Thread.sleep(20);
            }
        }
    }
}
