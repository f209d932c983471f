#!/bin/sh
# The public header compiles without a warning as C99 to C17 and as C++11 to C++20, and its
# initialisers initialise. $1: C compiler. Exit 77: no C++ compiler.
set -eu
cc=$1
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
try() {
    "$cc" -x "$1" -std="$2" -Wall -Wextra -Wpedantic -Werror -Iclient/include \
        -o "$work/use" tests/client/header_use.c
    "$work/use"
}
for std in c99 c11 c17; do try c $std; done
if ! printf 'int main() {}' | "$cc" -x c++ -fsyntax-only - 2>/dev/null; then
    echo "SKIP test_header: no C++ compiler (g++)"
    exit 77
fi
for std in c++11 c++17 c++20; do try c++ $std; done
