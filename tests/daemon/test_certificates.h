// Certificates made on the spot, for tests of mutual TLS.
#pragma once

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <memory>
#include <string>

namespace quarry::testing {

// A certificate and its key as PEM.
struct TestCertificate {
  std::string certificate, key;
};

// An authority that signs certificates, valid for a day. Not thread-safe.
class TestAuthority {
 public:
  explicit TestAuthority(const std::string& name) : key_(EVP_RSA_gen(2048)) {
    certificate_.reset(Make(name, key_.get(), nullptr));
  }
  std::string Pem() const { return PemOf(certificate_.get()); }

  TestCertificate Sign(const std::string& common_name) const {
    const std::unique_ptr<EVP_PKEY, KeyFree> key(EVP_RSA_gen(2048));
    const std::unique_ptr<X509, X509Free> certificate(
        Make(common_name, key.get(), certificate_.get()));
    return {PemOf(certificate.get()), PemOf(key.get())};
  }

 private:
  struct KeyFree {
    void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
  };
  struct X509Free {
    void operator()(X509* certificate) const { X509_free(certificate); }
  };

  static void Extend(X509* certificate, X509* issuer, int nid, const char* value) {
    X509V3_CTX context;
    X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
    X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value);
    X509_add_ext(certificate, extension, -1);
    X509_EXTENSION_free(extension);
  }

  // Signed by this authority, or by itself when there is no issuer.
  X509* Make(const std::string& name, EVP_PKEY* key, X509* issuer) const {
    X509* certificate = X509_new();
    X509_set_version(certificate, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), ++serial_);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -3600);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 86400);
    X509_set_pubkey(certificate, key);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_ASC,
                               reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
    X509* const by = issuer == nullptr ? certificate : issuer;
    X509_set_issuer_name(certificate, X509_get_subject_name(by));
    if (issuer == nullptr) {
      Extend(certificate, by, NID_basic_constraints, "critical,CA:TRUE");
    } else {
      Extend(certificate, by, NID_subject_alt_name, "DNS:localhost,IP:127.0.0.1");
    }
    X509_sign(certificate, key_.get(), EVP_sha256());
    return certificate;
  }

  template <typename F>
  static std::string PemWith(F write) {
    BIO* bio = BIO_new(BIO_s_mem());
    write(bio);
    char* data = nullptr;
    const long size = BIO_get_mem_data(bio, &data);
    std::string pem(data, static_cast<size_t>(size));
    BIO_free(bio);
    return pem;
  }
  static std::string PemOf(X509* certificate) {
    return PemWith([&](BIO* bio) { PEM_write_bio_X509(bio, certificate); });
  }
  static std::string PemOf(EVP_PKEY* key) {
    return PemWith([&](BIO* bio) {
      PEM_write_bio_PrivateKey(bio, key, nullptr, nullptr, 0, nullptr, nullptr);
    });
  }

  std::unique_ptr<EVP_PKEY, KeyFree> key_;
  std::unique_ptr<X509, X509Free> certificate_;
  mutable long serial_ = 0;
};

}  // namespace quarry::testing
