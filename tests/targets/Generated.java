// Allocates native memory from methods that the JVM has compiled, once told to.
import java.lang.reflect.Field;
import sun.misc.Unsafe;

public class Generated {
    static Unsafe unsafe;
    static long sum;

    static void hotLeaf(int i) {
        long block = unsafe.allocateMemory(70000 + (i & 1));
        sum += block & 15;
        unsafe.freeMemory(block);
    }

    static void hotMiddle(int i) {
        hotLeaf(i);
        sum += i;
    }

    public static void main(String[] arguments) throws Exception {
        Field field = Unsafe.class.getDeclaredField("theUnsafe");
        field.setAccessible(true);
        unsafe = (Unsafe) field.get(null);
        for (int i = 0; i < 3000; i++) {
            hotMiddle(i);
        }
        System.out.println("ready");
        System.in.read();
        for (int i = 0; i < 500; i++) {
            hotMiddle(i);
        }
        System.out.println("done");
        while (System.in.read() > 0) {
        }
        System.exit(sum > 0 ? 0 : 1);
    }
}
