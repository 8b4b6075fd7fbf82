package PVE::BackupAccess::Argument;

# Checks arguments for the other modules here. Each function dies with a message that names the
# argument. After that, the arguments have the right form for the C core.

use v5.36;

use Exporter qw(import);
use List::Util qw(pairgrep);

use PVE::BackupAccess::Error;

our @EXPORT_OK = qw(bad_argument check_bytes check_code check_filled_text check_flag check_hash
    check_options check_positive check_text given_options is_backup_id);

my $max_bytes = '18446744073709551615';    # 64 bits, unsigned

sub bad_argument ($message, %context) {
    PVE::BackupAccess::Error->throw('ArgumentError', $message, %context);
}

my sub shown ($value) {
    return defined($value) ? "'$value'" : 'undef';
}

sub check_text ($name, $value) {
    bad_argument("$name must be a string") if !defined($value) || ref($value);

    # C strings end at a NUL, and QEMU's names are UTF-8.
    bad_argument("$name must be valid UTF-8 without a NUL character, not " . shown($value))
        if $value =~ m/[\0\x{d800}-\x{dfff}]/ || $value =~ m/[^\x{0}-\x{10ffff}]/;
}

sub check_filled_text ($name, $value) {
    check_text($name, $value);
    bad_argument("$name must not be empty") if $value eq '';
}

sub check_positive ($name, $value) {
    bad_argument("$name must be a positive whole number, not " . shown($value))
        if !defined($value) || ref($value) || $value !~ m/\A[1-9][0-9]{0,8}\z/;
}

sub check_bytes ($name, $value) {
    bad_argument("$name must be a whole number of bytes, not " . shown($value))
        if !defined($value)
        || ref($value)
        || $value !~ m/\A(?:0|[1-9][0-9]{0,19})\z/
        || (length($value) == 20 && $value gt $max_bytes);
}

# The same check as the core's; see pba_companion_check_id.
sub is_backup_id ($value) {
    return defined($value) && !ref($value) && $value =~ m/\A[0-9a-f]{32}\z/;
}

sub check_flag ($name, $value) {
    bad_argument("$name must be 0 or 1, not " . shown($value))
        if ref($value) || ($value // '') !~ m/\A[01]?\z/;
}

sub check_code ($name, $value) {
    bad_argument("$name must be a code ref") if ref($value) ne 'CODE';
}

# Keys and values of a hash against { key => check }.
sub check_hash ($name, $hash, $checks) {
    bad_argument("$name must be a hash") if ref($hash) ne 'HASH';
    for my $key (sort keys $hash->%*) {
        bad_argument("unknown key '$key' in $name - it takes " . join(', ', sort keys $checks->%*))
            if !$checks->{$key};
        $checks->{$key}->("$key in $name", $hash->{$key});
    }
}

# A method's options as a hash, checked likewise.
sub check_options ($method, $options, $checks, @required) {
    bad_argument("options of $method must be pairs of names and values") if $options->@* % 2;
    my $hash = { $options->@* };
    for my $name (sort keys $hash->%*) {
        bad_argument(
            "unknown option '$name' for $method - it takes " . join(', ', sort keys $checks->%*))
            if !$checks->{$name};
        $checks->{$name}->($name, $hash->{$name});
    }
    defined($hash->{$_}) or bad_argument("$method needs the option '$_'") for @required;
    return $hash;
}

# The same, but undef counts as not given.
sub given_options ($method, $options, $checks, @required) {
    bad_argument("options of $method must be pairs of names and values") if $options->@* % 2;
    return check_options($method, [pairgrep { defined($b) } $options->@*], $checks, @required);
}

1;
