// What g++ 11 and newer ask of libstdc++ and glibc beyond those of manylinux_2_28 (GCC 8, glibc
// 2.28), said with what these have. Linked into wheels that are built on a newer system; the
// compilers of the manylinux images bring the same themselves. `make wheel-test` shows that nothing
// newer is left.
#include <new>
#include <sstream>

// Hidden by --exclude-libs when it is linked: no other library may come to use these.
extern "C" {

// Zero says that there may be threads, which is always right.
char __libc_single_threaded = 0;

// std::exception_ptr is one pointer to the exception. Its copy constructor and its destructor have
// been functions of the library from the beginning; newer headers inline them and call these two.
void exception_ptr_copy(void** self,
                        void* const* from) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void exception_ptr_destroy(void** self) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
void exception_ptr_addref(void** self) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void exception_ptr_release(void** self) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void exception_ptr_addref(void** self) {
  void* counted;
  exception_ptr_copy(&counted, self);
}

void exception_ptr_release(void** self) {
  void* last = *self;
  *self = nullptr;
  exception_ptr_destroy(&last);
}
}

namespace std {

[[noreturn]] void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

template basic_stringstream<char>::basic_stringstream();
template basic_ostringstream<char>::basic_ostringstream();

}  // namespace std
