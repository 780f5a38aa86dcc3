/* A program in C over the C interface; the test around it is c_interface_test.cc. */
#ifndef QUARRY_TESTS_CLIENT_C_SESSION_H_
#define QUARRY_TESTS_CLIENT_C_SESSION_H_

#ifdef __cplusplus
extern "C" {
#endif

/* Each goes against a fresh session of the daemon at `socket` and returns NULL, or what was wrong. */
const char* c_opens_appends_attends_and_reads(const char* socket);
const char* c_reuses_at_another_position(const char* socket);
const char* c_puts_and_leases(const char* socket);
const char* c_gets_codes_and_texts_for_errors(const char* socket);

#ifdef __cplusplus
}
#endif

#endif /* QUARRY_TESTS_CLIENT_C_SESSION_H_ */
