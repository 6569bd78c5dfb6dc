#!/bin/sh
# extract_cpp.sh FILE.md: prints the C++ blocks of a document up to the one with a main function,
# or nothing where no block has one.
exec awk '
  /^```/ { if (whole) exit; inside = !inside && /^```cpp/; next }
  inside { code = code $0 "\n"; if (/^int main\(/) whole = 1 }
  END { if (whole) printf "%s", code }' "$1"
