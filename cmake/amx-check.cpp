// Exits with 0 only if the kernel grants AMX to this process and its instructions run.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

int main() {
    const long arch_req_xcomp_perm = 0x1023;
    const long xfeature_xtiledata  = 18;
    if (syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) != 0) {
        return 1;
    }
    alignas(64) unsigned char config[64] = {};
    config[0]  = 1;  // palette
    config[16] = 64; // bytes per row of tile 0
    config[48] = 16; // rows of tile 0
    _tile_loadconfig(config);
    _tile_zero(0);
    _tile_release();
    return 0;
}
