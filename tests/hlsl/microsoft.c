// Compiles HLSL files with Microsoft's own compilers, as wgpu's DirectX backend calls them: FILE.5_1.hlsl with FXC
// (d3dcompiler_47.dll), FILE.6_2.hlsl with DXC (dxcompiler.dll). One line a file: ok or what the compiler says. Under
// Wine or on Windows; microsoft.sh builds and starts it.
//
//   microsoft.exe FXC.dll DXC.dll FILE...

#include <initguid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <windows.h>

DEFINE_GUID(CLSID_COMPILER, 0x73e22d93, 0xe6ce, 0x47f3, 0xb5, 0xbf, 0xf0, 0x66, 0x4f, 0x39, 0xc1, 0xb0);
DEFINE_GUID(IID_COMPILER3, 0x228b4687, 0x5a6a, 0x4730, 0x90, 0x0c, 0x97, 0x02, 0xb2, 0x20, 0x3f, 0x54);
DEFINE_GUID(IID_RESULT, 0x58346cda, 0xdde7, 0x4497, 0x94, 0x61, 0x6f, 0x87, 0xaf, 0x5e, 0x06, 0x59);

// The parts of the interfaces that are used, in the order of their tables.
typedef struct Blob { struct BlobTable *table; } Blob;
struct BlobTable {
    void *query; ULONG (WINAPI *add)(Blob *); ULONG (WINAPI *release)(Blob *);
    void *(WINAPI *data)(Blob *); SIZE_T (WINAPI *size)(Blob *);
};
typedef struct Outcome { struct OutcomeTable *table; } Outcome;
struct OutcomeTable {
    void *query; ULONG (WINAPI *add)(Outcome *); ULONG (WINAPI *release)(Outcome *);
    HRESULT (WINAPI *status)(Outcome *, HRESULT *);
    HRESULT (WINAPI *result)(Outcome *, Blob **);
    HRESULT (WINAPI *errors)(Outcome *, Blob **);
};
typedef struct { const void *data; SIZE_T size; UINT encoding; } Source;
typedef struct Dxc { struct DxcTable *table; } Dxc;
struct DxcTable {
    void *query; ULONG (WINAPI *add)(Dxc *); ULONG (WINAPI *release)(Dxc *);
    HRESULT (WINAPI *compile)(Dxc *, const Source *, const WCHAR **, UINT, void *, REFIID, void **);
};
typedef HRESULT (WINAPI *Create)(REFCLSID, REFIID, void **);
typedef HRESULT (WINAPI *Fxc)(const void *, SIZE_T, const char *, const void *, void *, const char *, const char *, UINT,
                              UINT, Blob **, Blob **);

static int failures;

static void say(const char *compiler, const char *file, HRESULT status, Blob *code, Blob *errors) {
    const char *name = strrchr(file, '/') ? strrchr(file, '/') + 1 : file;
    int length = errors ? (int)errors->table->size(errors) : 0;
    if (SUCCEEDED(status) && code && code->table->size(code) > 0) {
        printf("%s\t%s\tok\t%u\n", compiler, name, (unsigned)code->table->size(code));
        return;
    }
    failures++;
    printf("%s\t%s\trefused\t%08x ", compiler, name, (unsigned)status);
    for (int i = 0; i < length && i < 400; i++) {
        char c = ((char *)errors->table->data(errors))[i];
        putchar(c == '\n' || c == '\t' ? ' ' : c ? c : ' ');
    }
    putchar('\n');
}

int main(int count, char **words) {
    if (count < 4) {
        fprintf(stderr, "usage: microsoft.exe FXC.dll DXC.dll FILE...\n");
        return 2;
    }
    HMODULE fxc_library = LoadLibraryA(words[1]), dxc_library = LoadLibraryA(words[2]);
    if (!fxc_library || !dxc_library) {
        fprintf(stderr, "cannot load %s\n", fxc_library ? words[2] : words[1]);
        return 2;
    }
    Fxc fxc = (Fxc)(void *)GetProcAddress(fxc_library, "D3DCompile");
    Create create = (Create)(void *)GetProcAddress(dxc_library, "DxcCreateInstance");
    Dxc *dxc = NULL;
    if (!fxc || !create || FAILED(create(&CLSID_COMPILER, &IID_COMPILER3, (void **)&dxc))) {
        fprintf(stderr, "these libraries are no compilers\n");
        return 2;
    }
    for (int i = 3; i < count; i++) {
        FILE *file = fopen(words[i], "rb");
        if (!file) { fprintf(stderr, "cannot read %s\n", words[i]); return 2; }
        fseek(file, 0, SEEK_END);
        long size = ftell(file);
        rewind(file);
        char *text = malloc(size + 1);
        size = (long)fread(text, 1, size, file);
        fclose(file);
        Blob *code = NULL, *errors = NULL;
        if (strstr(words[i], ".5_1.hlsl")) {
            const UINT strict = 1 << 11;
            HRESULT status = fxc(text, size, NULL, NULL, NULL, "main", "cs_5_1", strict, 0, &code, &errors);
            say("FXC", words[i], status, code, errors);
        } else {
            const WCHAR *options[] = {L"-E", L"main", L"-T", L"cs_6_2", L"-HV", L"2018", L"-no-warnings", L"-Ges",
                                      L"-enable-16bit-types"};
            Source source = {text, (SIZE_T)size, 65001};
            Outcome *outcome = NULL;
            HRESULT status = dxc->table->compile(dxc, &source, options, sizeof options / sizeof *options, NULL,
                                                 &IID_RESULT, (void **)&outcome);
            if (SUCCEEDED(status)) {
                outcome->table->status(outcome, &status);
                outcome->table->errors(outcome, &errors);
                outcome->table->result(outcome, &code);
            }
            say("DXC", words[i], status, code, errors);
        }
        fflush(stdout);
        free(text);
    }
    return failures > 0;
}
