/* llvm ROUNDS: has libLLVM read, optimize and print a module, through its C interface. */
#include <dlfcn.h>

#include "target.h"

typedef void *ref;

static const char module[] =
        "@table = global [64 x i64] zeroinitializer\n"
        "define i64 @sum(i64 %n) {\n"
        "entry:\n"
        "  br label %loop\n"
        "loop:\n"
        "  %i = phi i64 [ 0, %entry ], [ %next, %loop ]\n"
        "  %s = phi i64 [ 0, %entry ], [ %added, %loop ]\n"
        "  %at = and i64 %i, 63\n"
        "  %p = getelementptr [64 x i64], [64 x i64]* @table, i64 0, i64 %at\n"
        "  %v = load i64, i64* %p\n"
        "  %square = mul i64 %v, %v\n"
        "  %added = add i64 %s, %square\n"
        "  store i64 %added, i64* %p\n"
        "  %next = add i64 %i, 1\n"
        "  %more = icmp ult i64 %next, %n\n"
        "  br i1 %more, label %loop, label %out\n"
        "out:\n"
        "  ret i64 %added\n"
        "}\n"
        "define i64 @twice(i64 %n) {\n"
        "  %a = call i64 @sum(i64 %n)\n"
        "  %b = call i64 @sum(i64 %a)\n"
        "  ret i64 %b\n"
        "}\n";

static void *library;

static void *function(const char *name)
{
        void *found = dlsym(library, name);
        check(found != NULL, name);
        return found;
}

KEEP void optimize(void)
{
        ref (*create)(void) = function("LLVMContextCreate");
        ref (*buffer)(const char *, size_t, const char *) =
                function("LLVMCreateMemoryBufferWithMemoryRangeCopy");
        int (*parse)(ref, ref, ref *, char **) = function("LLVMParseIRInContext");
        ref (*options)(void) = function("LLVMCreatePassBuilderOptions");
        ref (*run)(ref, const char *, ref, ref) = function("LLVMRunPasses");
        char *(*print)(ref) = function("LLVMPrintModuleToString");
        void (*free_text)(char *) = function("LLVMDisposeMessage");
        void (*free_options)(ref) = function("LLVMDisposePassBuilderOptions");
        void (*free_module)(ref) = function("LLVMDisposeModule");
        void (*free_context)(ref) = function("LLVMContextDispose");

        ref context = create(), parsed = NULL, how = options();
        char *message = NULL;
        ref text = buffer(module, sizeof module - 1, "module");
        check(parse(context, text, &parsed, &message) == 0, "a module");
        check(run(parsed, "default<O2>", NULL, how) == NULL, "passes");
        char *printed = print(parsed);
        check(strstr(printed, "@twice") != NULL, "an optimized module");
        free_text(printed);
        free_options(how);
        free_module(parsed);
        free_context(context);
}

int main(int argc, char **argv)
{
        library = dlopen("libLLVM-14.so.1", RTLD_NOW);
        check(library != NULL, "libLLVM-14.so.1");
        wait_for_go();
        for (unsigned long left = number(argc, argv, 1, 1); left > 0; left--)
                optimize();
        wait_for_end();
        return 0;
}
