#include "proto/model_spec.h"
