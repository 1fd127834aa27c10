#pragma once

struct __half {
  _Float16 value;
};
inline float __half2float(__half half) { return half.value; }
