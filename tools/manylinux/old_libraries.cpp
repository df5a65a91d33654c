// What the code asks of libraries that glibc 2.28's machines lack: glibc of 2.32, libstdc++ of GCC 9
// and 11. It becomes part of the modules, seen by nobody else.
#include <new>
#include <sstream>

// Whether there is one thread only: perhaps not.
extern "C" char __libc_single_threaded = 0;

namespace std {

void __throw_bad_array_new_length() { throw bad_array_new_length(); }

template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();
#if __cplusplus > 201703L
template basic_string<char> basic_stringbuf<char>::str() const&;
template basic_string<char> basic_stringbuf<char>::str() &&;
#endif

}  // namespace std
