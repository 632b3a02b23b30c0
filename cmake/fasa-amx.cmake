# Some virtual machines advertise AMX and trap on its first instruction; ggml built with -march=native then dies in
# prefill. So AMX is believed only after it has run here.

if(CMAKE_CROSSCOMPILING OR FASA_PORTABLE OR NOT CMAKE_SYSTEM_NAME STREQUAL "Linux"
        OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" OR (DEFINED GGML_NATIVE AND NOT GGML_NATIVE) OR NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    return()
endif()

include(CheckCXXSourceCompiles)
set(CMAKE_REQUIRED_FLAGS -march=native)
check_cxx_source_compiles("
#ifndef __AMX_TILE__
#error no AMX
#endif
int main() { return 0; }" FASA_AMX_CLAIMED)
unset(CMAKE_REQUIRED_FLAGS)

if(FASA_AMX_CLAIMED)
    try_run(FASA_AMX_RUN FASA_AMX_COMPILED
        "${CMAKE_BINARY_DIR}/amx-check" "${CMAKE_CURRENT_LIST_DIR}/amx-check.cpp"
        COMPILE_DEFINITIONS -march=native)
    if(FASA_AMX_COMPILED AND FASA_AMX_RUN EQUAL 0)
        message(STATUS "FASA: AMX runs on this machine")
    else()
        message(STATUS "FASA: AMX is advertised but does not run on this machine, building without it")
        foreach(lang C CXX)
            string(APPEND CMAKE_${lang}_FLAGS " -mno-amx-tile -mno-amx-int8 -mno-amx-bf16")
        endforeach()
    endif()
endif()
